import dataclasses
import json

from etils import epath
import jax
import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.data.documents.store import Bank, Document, DocumentStore, Segment
from cm3leon_jax.data.rows import loader
from cm3leon_jax.evaluation.config import EvaluationConfig
from cm3leon_jax.evaluation.likelihood import bits, document_scores, pairs
from cm3leon_jax.evaluation.likelihood.document_scores import Scorer, Search, Totals
from cm3leon_jax.evaluation.likelihood.given_documents import StoredDocuments, open_documents
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.generation.tasks import PromptLayout
from cm3leon_jax.positions import positions_of
from cm3leon_jax.retrieval.bank import load_clip
from cm3leon_jax.retrieval.neighbors import Retriever
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from cm3leon_jax.trained.run import Run
from tests.data.stores import VOCAB
from tests.generation.run import SETTINGS, one_device, save_run
from tests.models.tiny import model_logits, random_params

ORIGIN = ("s", "l", "a")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  root = epath.Path(tmp_path_factory.mktemp("run"))
  save_run(root)
  return root


@pytest.fixture(scope="module")
def layout(workdir):
  return PromptLayout.of(Run(workdir, SETTINGS))


@pytest.fixture(scope="module")
def scorer():
  with one_device():
    params = random_params(SETTINGS.model)
    yield Scorer(params, SETTINGS.model, VOCAB, SETTINGS.data.sequence_length, batch_size=2)


def document(key, *sizes, seed=0, concept=""):
  rng = np.random.default_rng([seed, *map(abs, sizes)])

  def segment(size):
    low, high = (VOCAB.text_size, VOCAB.size) if size < 0 else (VOCAB.num_special, VOCAB.text_size)
    return Segment(size < 0, rng.integers(low, high, abs(size)).astype(np.int32))

  return Document(key, tuple(map(segment, sizes)), *ORIGIN, concept=concept)


def forward(params, model, sample):
  """Returns the log-probability of each target of a sample, from a row without padding."""
  inputs = np.asarray(sample[:-1])[None]
  places = positions_of(sample, VOCAB, model.align_images)[None, :-1]
  logits = model_logits(model, params, inputs, places, np.ones_like(inputs))
  log_probs = np.asarray(jax.nn.log_softmax(logits))[0]
  assert log_probs.shape == (len(sample) - 1, VOCAB.size)
  return log_probs[np.arange(len(sample) - 1), sample[1:]]


@pytest.mark.parametrize("align_images", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_log_probs_are_those_of_a_plain_forward_pass(scorer, align_images):
  if align_images:
    model = dataclasses.replace(SETTINGS.model, family="modern", align_images=True)
    scorer = dataclasses.replace(scorer, params=random_params(model), model=model)
  documents = [
    document("text", 7),
    document("pair", 5, -16),
    document("mixed", 3, -16, 4, -16),
    document("image", -16),
    document("long", 100),  # Needs a longer row.
  ]
  neighbors = [(), (document("n", 4, -16), document("m", 6, -16)), (), (), ()]
  together = dataclasses.replace(scorer, find=lambda _: neighbors).score(documents)
  alone = scorer.score(documents)
  for i, (one, line) in enumerate(zip(documents, together, strict=True)):
    sample = loader.join([*neighbors[i], one], VOCAB)
    expected = forward(scorer.params, scorer.model, sample)
    tokens = loader.join([one], VOCAB)
    assert line["tokens"] == tokens.tolist()
    assert line["log_probs"][0] is None
    np.testing.assert_allclose(
      line["log_probs"][1:], expected[1 - len(tokens) :], rtol=1e-4, atol=1e-4
    )
    assert line["log_prob"] == pytest.approx(expected[1 - len(tokens) :].sum(), rel=1e-4)
    assert np.std(line["log_probs"][1:]) > 0.1
  assert [line["neighbors"] for line in together] == [[], ["n", "m"], [], [], []]
  # Negative control: a neighbor changes only the scores of its own document.
  changed = [
    not np.allclose(a["log_probs"][1:], b["log_probs"][1:], atol=1e-3)
    for a, b in zip(together, alone)
  ]
  assert changed == [False, True, False, False, False]


def test_a_line_has_the_tokens_of_the_document_alone():
  one = Document(
    "k", (Segment(False, np.array([38, 39])), Segment(True, np.array([519]))), *ORIGIN, concept="c"
  )
  neighbor = Document("n", (Segment(False, np.array([60])),), *ORIGIN)
  sample = loader.join([neighbor, one], VOCAB)
  log_probs = np.array([-100, -200, -1, -2, -4, -8, -16.0])
  assert document_scores.line_of(one, sample, log_probs, ["n"], VOCAB) == {
    "key": "k",
    "concept": "c",
    "neighbors": ["n"],
    "tokens": [VOCAB.eos, 38, 39, VOCAB.brk, 519, VOCAB.eos],
    "log_probs": [None, -1, -2, -4, -8, -16],
    "segments": [
      {"modality": "text", "start": 1, "stop": 3, "log_prob": -3},
      {"modality": "image", "start": 4, "stop": 5, "log_prob": -8},
    ],
    "text": {"tokens": 2, "log_prob": -3},
    "image": {"tokens": 1, "log_prob": -8},
    "special": {"tokens": 2, "log_prob": -20},
    "log_prob": -31,
  }


def test_rows_have_few_lengths():
  assert [document_scores.row_length(n, 400) for n in (3, 64, 65, 300)] == [
    64, 64, 128, 400,
  ]  # fmt: skip


def search(workdir, layout, count):
  clip = load_clip("", workdir, VOCAB)
  retriever = Retriever(workdir / "neighbors", SETTINGS.retrieval)
  return Search(count, retriever, Bank(workdir / "documents", VOCAB), clip, layout)


@pytest.mark.parametrize("retrieve", [0, 2])
def test_sums_are_those_of_pairs(workdir, layout, scorer, tmp_path, retrieve):
  texts, rng = ["red apple", "an old blue house"], np.random.default_rng(0)
  lines = []
  for i, text in enumerate(texts):
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / f"{i}.png")
    lines.append(json.dumps({"image": f"{i}.png", "caption": text}))
  (tmp_path / "docs.jsonl").write_text("\n".join(lines))
  file = open_documents(tmp_path / "docs.jsonl", layout, {})
  if retrieve:
    scorer = dataclasses.replace(scorer, find=search(workdir, layout, retrieve))
  found = document_scores.run(
    scorer, file, file.check(), ImageTokenizer.load(workdir / "vqgan"), tmp_path / "out"
  )
  images = [str(tmp_path / f"{i}.png") for i in range(2)]
  run = Pipeline.load(Run(workdir, SETTINGS), scorer.params, load_clip("", workdir, VOCAB))
  expected = pairs.score(run, scorer.params, list(zip(texts, images)), retrieve)
  scored = read(tmp_path / "out")
  for line, pair in zip(scored, expected, strict=True):
    assert line["text"]["log_prob"] == pytest.approx(pair.text, rel=1e-5)
    assert line["image"]["log_prob"] == pytest.approx(pair.image_given_text, rel=1e-5)
    assert line["text"]["tokens"] == pair.text_tokens
    assert line["image"]["tokens"] == pair.image_tokens
    assert len(line["neighbors"]) == retrieve
  assert found["mean_neighbors"] == retrieve
  assert scored[0]["log_prob"] != pytest.approx(expected[1].text + expected[1].image_given_text)


def read(folder):
  path = epath.Path(folder) / document_scores.SCORES
  return [json.loads(line) for line in path.read_text().splitlines()]


def heldout(workdir, layout):
  store = DocumentStore(workdir / "documents" / "heldout_pairs", VOCAB)
  return StoredDocuments(store, layout, "made")


@pytest.mark.parametrize(("retrieve", "condition"), [(0, "none"), (2, "true")])
def test_bits_of_a_store_are_those_of_the_evaluation(
  workdir, layout, scorer, tmp_path, retrieve, condition
):
  documents, config = heldout(workdir, layout), EvaluationConfig(batch_size=2)
  find = search(workdir, layout, 2)
  texts = [layout.decode(documents.store[i].segments[0].tokens) for i in range(5)]
  queries = find.clip.embed_texts([layout.encode(text) for text in texts])
  ids, _ = find.retriever.retrieve(queries)
  expected = bits.evaluate(
    scorer.params, SETTINGS.model, find.bank, documents.store, ids, VOCAB, SETTINGS.data, config, 0
  )
  if retrieve:
    scorer = dataclasses.replace(scorer, find=find)
  found = document_scores.run(scorer, documents, documents.check(), None, tmp_path)
  assert found["mean_neighbors"] == expected["mean_neighbors"][condition]
  for modality in bits.MODALITIES:
    assert found[modality]["tokens"] == expected[modality]["tokens"]
    wanted = expected[modality][condition]
    # Only the interval's ends may differ, because the bootstrap draws concepts in another order.
    assert {k: found[modality][k] for k in ("bits", "groups", "effective_groups")} == pytest.approx(
      {k: wanted[k] for k in ("bits", "groups", "effective_groups")}, rel=1e-5
    )
    assert found[modality]["low"] == pytest.approx(wanted["low"], rel=0.02)


def line(text=(0, 0.0), image=(0, 0.0), concept="", neighbors=()):
  counts = {"text": text, "image": image, "special": (1, -np.log(4))}
  sums = {name: {"tokens": n, "log_prob": value} for name, (n, value) in counts.items()}
  return {"concept": concept, "neighbors": list(neighbors), **sums}


def test_perplexity_is_that_of_all_tokens_of_a_modality():
  totals = Totals()
  totals.add(line(text=(2, -np.log(4)), neighbors=["a"]))
  totals.add(line(text=(1, -np.log(16)), image=(4, -4 * np.log(8))))
  found = totals.summary(num_resamples=200, seed=0)
  assert (found["documents"], found["mean_neighbors"]) == (2, 0.5)
  text, image, special = (found[name] for name in document_scores.MODALITIES)
  # The texts have 2 + 4 bits and 3 tokens.
  assert (text["documents"], text["tokens"], text["groups"]) == (2, 3, 2)
  assert text["bits"] == pytest.approx(2)
  assert text["perplexity"] == pytest.approx(4)
  assert text["log_prob"] == pytest.approx(-6 * np.log(2))
  # The mean bits of each of the two documents.
  assert (text["low"], text["high"]) == pytest.approx((1, 4))
  assert (text["perplexity_low"], text["perplexity_high"]) == pytest.approx((2, 16))
  assert (image["documents"], image["bits"], image["perplexity"]) == pytest.approx((1, 3, 8))
  assert [image[f"{p}{end}"] for p in ("", "perplexity_") for end in ("low", "high")] == [None] * 4
  assert (special["tokens"], special["perplexity"]) == (2, pytest.approx(4))
  assert document_scores.describe(found) == (
    "2 documents; text: perplexity 4 [2, 16], 2.000 bits a token, 3 tokens; image: perplexity 8, "
    "3.000 bits a token, 4 tokens"
  )


def test_a_modality_without_tokens_has_no_numbers():
  totals = Totals()
  totals.add(line(text=(1, -1.0)))
  found = totals.summary(200, 0)
  assert found["image"] is None
  sentence = "1 document; text: perplexity 2.718, 1.443 bits a token, 1 token"
  assert document_scores.describe(found) == sentence


def test_intervals_resample_concepts_of_any_number_of_documents():
  totals = Totals(most=3)
  for concept in ("fox", "fox", "", "cat"):
    totals.add(line(text=(2, -1.0), concept=concept))
  assert totals.summary(200, 0)["text"]["groups"] == 3
  for i in range(50):
    totals.add(line(text=(2, -1.0), concept=f"more {i}"))
  found = totals.summary(200, 0)["text"]
  assert len(totals.rows) == 3
  assert (found["documents"], found["tokens"], found["groups"]) == (54, 108, 3)
  assert totals.row("more 7") == totals.row("more 7")


def test_pairs_have_neighbors_and_none_is_its_own(workdir, layout):
  find = search(workdir, layout, 3)
  one = document("new", 4, -16)
  others = [document("text", 4), document("image first", -16, 4), document("three", 4, -16, 4)]
  found = find([*others[:2], one, others[2]])
  assert [len(neighbors) for neighbors in found] == [0, 0, 3, 0]
  best = found[2][0]
  (again,) = find([dataclasses.replace(one, key=best.key)])
  assert best.key not in [neighbor.key for neighbor in again]
  assert [neighbor.key for neighbor in again[:2]] == [neighbor.key for neighbor in found[2][1:]]
  assert find(others) == [(), (), ()]


@dataclasses.dataclass(frozen=True)
class Dying:
  """Scorer that raises an error after some parts, as if its command was killed."""

  scorer: Scorer
  parts: int
  scored: list

  def score(self, documents):
    if len(self.scored) == self.parts:
      raise KeyboardInterrupt
    self.scored.append([d.key for d in documents])
    return self.scorer.score(documents)


def test_a_killed_command_continues_after_its_last_part(workdir, layout, scorer, tmp_path):
  documents = heldout(workdir, layout)
  checked = documents.check()
  whole = document_scores.run(scorer, documents, checked, None, tmp_path / "whole", part=2)
  first, second = Dying(scorer, 2, []), Dying(scorer, 9, [])
  with pytest.raises(KeyboardInterrupt):
    document_scores.run(first, documents, checked, None, tmp_path / "killed", part=2)
  assert not (tmp_path / "killed" / document_scores.SCORES).exists()
  found = document_scores.run(second, documents, checked, None, tmp_path / "killed", part=2)
  assert first.scored == [["h0", "h1"], ["h2", "h3"]]
  assert second.scored == [["h4"]]
  assert found == whole
  names = [tmp_path / name / document_scores.SCORES for name in ("whole", "killed")]
  assert names[0].read_bytes() == names[1].read_bytes()
  assert [line["key"] for line in read(tmp_path / "killed")] == [f"h{i}" for i in range(5)]
  assert [path.name for path in (tmp_path / "killed").iterdir()] == [document_scores.SCORES]
