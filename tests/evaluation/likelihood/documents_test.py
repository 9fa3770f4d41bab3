import dataclasses
import json

from etils import epath
import jax
import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.config.sampling import EvaluationConfig
from cm3leon_jax.data.documents.store import Bank, Document, DocumentStore, Segment
from cm3leon_jax.data.rows import loader
from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation.likelihood import bits, documents
from cm3leon_jax.evaluation.likelihood.document_files import open_documents
from cm3leon_jax.evaluation.likelihood.documents import Scorer, Search
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.generation.tasks import PromptLayout
from cm3leon_jax.positions import positions_of
from cm3leon_jax.retrieval.bank import load_clip
from cm3leon_jax.retrieval.neighbors import Retriever
from cm3leon_jax.run.run import Run
from cm3leon_jax.stages import stages
from tests.data.stores import IMAGE_TOKENS, VOCAB
from tests.generation.run import SETTINGS, one_device, save_run
from tests.models.tiny import model_logits, random_params
from tests.refusals import refused

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
  docs = [
    document("text", 7),
    document("pair", 5, -16),
    document("mixed", 3, -16, 4, -16),
    document("image", -16),
    document("long", 100),  # Needs a longer row.
  ]
  neighbors = [(), (document("n", 4, -16), document("m", 6, -16)), (), (), ()]
  together = dataclasses.replace(scorer, find=lambda _: neighbors).score(docs)
  alone = scorer.score(docs)
  for i, (one, line) in enumerate(zip(docs, together, strict=True)):
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
  assert documents.line_of(one, sample, log_probs, ["n"], VOCAB) == {
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


def search(workdir, layout, count):
  clip = load_clip("", workdir, VOCAB)
  retriever = Retriever(workdir / "neighbors", SETTINGS.retrieval)
  return Search(count, retriever, Bank(workdir / "documents", VOCAB), clip, layout)


def read(folder):
  path = epath.Path(folder) / documents.SCORES
  return [json.loads(line) for line in path.read_text().splitlines()]


def heldout(workdir):
  return DocumentStore(workdir / "documents" / "heldout_pairs", VOCAB)


@pytest.mark.parametrize(("retrieve", "condition"), [(0, "none"), (2, "true")])
def test_bits_of_a_store_are_those_of_the_evaluation(
  workdir, layout, scorer, tmp_path, retrieve, condition
):
  store, config = heldout(workdir), EvaluationConfig(batch_size=2)
  find = search(workdir, layout, 2)
  texts = [layout.decode(store[i].segments[0].tokens) for i in range(5)]
  queries = find.clip.embed_texts([layout.encode(text) for text in texts])
  ids, _ = find.retriever.retrieve(queries)
  expected = bits.evaluate(
    scorer.params, SETTINGS.model, find.bank, store, ids, VOCAB, SETTINGS.data, config, 0
  )
  if retrieve:
    scorer = dataclasses.replace(scorer, find=find)
  found = documents.run(scorer, store, tmp_path)
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
  lines = [
    line(text=(2, -np.log(4)), neighbors=["a"]),
    line(text=(1, -np.log(16)), image=(4, -4 * np.log(8))),
  ]
  found = documents.summary(lines, num_resamples=200, seed=0)
  assert (found["documents"], found["mean_neighbors"]) == (2, 0.5)
  text, image, special = (found[name] for name in documents.MODALITIES)
  # The texts have 2 + 4 bits and 3 tokens.
  assert (text["documents"], text["tokens"], text["groups"]) == (2, 3, 2)
  assert text["bits"] == pytest.approx(2)
  assert text["perplexity"] == pytest.approx(4)
  # The mean bits of each of the two documents.
  assert (text["low"], text["high"]) == pytest.approx((1, 4))
  assert (text["perplexity_low"], text["perplexity_high"]) == pytest.approx((2, 16))
  assert (image["documents"], image["bits"], image["perplexity"]) == pytest.approx((1, 3, 8))
  assert image["low"] is image["perplexity_high"] is None
  assert special["tokens"] == 2
  assert documents.describe(found) == (
    "2 documents; text: perplexity 4 [2, 16], 2.000 bits a token, 3 tokens; image: perplexity 8, "
    "3.000 bits a token, 4 tokens"
  )
  assert documents.summary(lines[:1], 200, 0)["image"] is None
  concepts = [line(text=(2, -1.0), concept=concept) for concept in ("fox", "fox", "", "cat")]
  assert documents.summary(concepts, 200, 0)["text"]["groups"] == 3


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


def test_a_killed_command_continues_after_its_last_part(workdir, scorer, tmp_path):
  store = heldout(workdir)
  whole = documents.run(scorer, store, tmp_path / "whole", part=2)
  first, second = Dying(scorer, 2, []), Dying(scorer, 9, [])
  with pytest.raises(KeyboardInterrupt):
    documents.run(first, store, tmp_path / "killed", part=2)
  assert not (tmp_path / "killed" / documents.SCORES).exists()
  found = documents.run(second, store, tmp_path / "killed", part=2)
  assert first.scored == [["h0", "h1"], ["h2", "h3"]]
  assert second.scored == [["h4"]]
  assert found == whole
  names = [tmp_path / name / documents.SCORES for name in ("whole", "killed")]
  assert names[0].read_bytes() == names[1].read_bytes()
  assert [line["key"] for line in read(tmp_path / "killed")] == [f"h{i}" for i in range(5)]
  assert [path.name for path in (tmp_path / "killed").iterdir()] == [documents.SCORES]


POSITIONS = 64
TOKENIZERS = {"text_tokenizer": "t1", "vqgan": "v1"}


def encode(text):
  return np.array([VOCAB.num_special + len(word) for word in text.split()], np.int32)


class Tokenizer:
  """Fake tokenizer: all codes of an image are the red value of its first pixel, modulo 64."""

  def encode(self, images):
    return np.repeat(images[:, 0, 0, :1].astype(np.int32) % 64, IMAGE_TOKENS, axis=1)


@pytest.fixture
def write(tmp_path):
  (tmp_path / "photos").mkdir()
  for name, red, size in (("a", 5, (8, 8)), ("photos/b", 9, (8, 8)), ("wide", 5, (24, 8))):
    Image.new("RGB", size, (red, 0, 0)).save(tmp_path / f"{name}.png")
  layout = PromptLayout(VOCAB, IMAGE_TOKENS, 8, POSITIONS, encode, None)

  def call(*lines, **options):
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in lines))
    return open_documents(path, layout, TOKENIZERS, Tokenizer(), **options)

  return call


def test_every_form_is_read_as_training_documents_are(write, tmp_path):
  origin = {"source": "s", "license": "CC0-1.0", "attribution": "me"}
  found, _ = write(
    {"text": "a bell"},
    "\n",
    {"key": "p", "image": "a.png", "caption": "two red keys", "concept": "key", **origin},
    {"group": "g", "segments": [{"image": "photos/b.png"}, {"text": "so"}, {"image": "a.png"}]},
    {"image": str(tmp_path / "a.png"), "caption": "c", "facts": {}, "split": "heldout"},
  )
  assert [d.key for d in found] == ["docs.jsonl/0", "p", "docs.jsonl/2", "docs.jsonl/3"]
  pair, mixed = found[1:3]
  assert (pair.source, pair.license, pair.attribution, pair.concept) == (*origin.values(), "key")
  assert mixed.group == mixed.concept == "g"
  five, nine = (np.full(IMAGE_TOKENS, VOCAB.text_size + code) for code in (5, 9))
  expected = [
    [(False, encode("a bell"))],
    [(False, encode("two red keys")), (True, five)],
    [(True, nine), (False, encode("so")), (True, five)],
    [(False, encode("c")), (True, five)],
  ]
  for one, segments in zip(found, expected, strict=True):
    for segment, (is_image, tokens) in zip(one.segments, segments, strict=True):
      assert segment.is_image == is_image
      np.testing.assert_array_equal(segment.tokens, tokens)


def test_images_are_cropped_or_padded_and_the_digest_tells_all_apart(write):
  line = {"image": "wide.png", "caption": "a"}
  codes, digests = [], []
  for crop in ("center", "pad"):
    [one], digest = write(line, crop=crop)
    codes.append(one.segments[1].tokens[0] - VOCAB.text_size)
    digests.append(digest)
  assert codes == [5, 255 % 64]  # The padding is white.
  assert write(line)[1] == digests[0]
  others = [write({**line, **change})[1] for change in ({"caption": "bb"}, {"key": "k"})]
  assert len({*digests, *others}) == 4


@pytest.mark.parametrize(
  ("line", "fact"),
  [
    ('{"text": \n', "JSON"),
    ([1], "JSON"),
    ({"txt": "a"}, "text"),
    ({"text": "a", "licence": "x"}, "licence"),
    ({"text": " "}, "'text'"),
    ({"text": 5}, "'text'"),
    ({"key": "k", "segments": []}, "segments"),
    ({"image": "a.png"}, "'caption'"),
    ({"image": "../a.png", "caption": "a"}, "../a.png"),
  ],
  ids=str,
)
def test_a_wrong_line_is_refused_by_file_line_and_field(write, line, fact):
  with refused(UserError, "docs.jsonl, line 2", fact):
    write({"text": "all right"}, line)


def test_files_that_are_no_documents_are_refused(write, tmp_path):
  with refused(UserError, "docs.jsonl"):
    write("\n\n")
  with refused(UserError, "no.png"):
    write({"image": "no.png", "caption": "a"})
  with refused(UserError, "none.jsonl"):
    open_documents(tmp_path / "none.jsonl", None, TOKENIZERS, Tokenizer())


def test_a_store_of_other_tokenizers_is_refused(workdir, layout):
  folder = workdir / "documents" / "heldout_pairs"
  done = workdir / "documents" / stages.DONE
  write_json(done, {"config": {"inputs": {"raw": "r", **TOKENIZERS}}, "id": "made"})
  store, _ = open_documents(folder, layout, TOKENIZERS, None)
  assert len(store) == 5
  with refused(UserError, "vqgan"):
    open_documents(folder, layout, {**TOKENIZERS, "vqgan": "v2"}, None)
