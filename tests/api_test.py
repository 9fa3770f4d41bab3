import doctest
import io
import json
import pathlib
import tempfile

import jax
import numpy as np
from PIL import Image
import pytest

import cm3leon_jax
from cm3leon_jax import CM3Leon
from cm3leon_jax.commands import common, generate
from cm3leon_jax.config.sampling import EvaluationConfig
from cm3leon_jax.data.documents.store import Document, DocumentStore, Segment, write_documents
from cm3leon_jax.data.rows.cm3 import apply_cm3_mask
from cm3leon_jax.data.rows.loader import join
from cm3leon_jax.evaluation.likelihood import bits
from cm3leon_jax.retrieval.neighbors import Retriever
from cm3leon_jax.weights import reading
from tests.data.stores import VOCAB
from tests.generation.run import SETTINGS, one_device
from tests.models.tiny import model_logits
from tests.refusals import check_sentence, refused

pytestmark = pytest.mark.filterwarnings("ignore:(this model|retrieve is) ")
ROOT = pathlib.Path(__file__).parents[1]
PUBLIC = {name for name in vars(CM3Leon) if not name.startswith("_")}
EXAMPLES = {
  test.name.rpartition(".")[2]: test
  for test in doctest.DocTestFinder().find(CM3Leon, "CM3Leon")
  if test.examples
}


def picture(seed: int) -> Image.Image:
  return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8))


IMAGE = picture(0)


@pytest.fixture
def compiled():
  """Returns a list that collects the names of the programs that JAX compiles during a test."""
  found = []

  def note(event, seconds, **about):
    if event == "/jax/core/compile/backend_compile_duration":
      found.append(about.get("fun_name", event))

  jax.monitoring.register_event_duration_secs_listener(note)
  yield found
  jax.monitoring.unregister_event_duration_listener(note)


def failures(test: doctest.DocTest, **names) -> int:
  with tempfile.TemporaryDirectory() as folder:
    test.globs = {"CM3Leon": CM3Leon, "image": IMAGE, "folder": f"{folder}/bundle", **names}
    return doctest.DocTestRunner(verbose=False).run(test, clear_globs=False).failed


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of_a_call_run(name, model, run):
  assert failures(EXAMPLES[name], model=model, workdir=run) == 0


def test_every_call_has_an_example_and_a_wrong_one_is_noticed(model):
  calls = {name for name in PUBLIC if callable(getattr(CM3Leon, name))}
  # `finetune` takes minutes; tests/notebooks_test.py runs it.
  assert calls == {*EXAMPLES, "finetune"}
  wrong = doctest.DocTestParser().get_doctest(">>> model.step\n8\n", {}, "wrong", None, 0)
  assert failures(wrong, model=model) == 1


def test_a_notebook_shows_samples_and_the_model(model, run):
  samples = model.generate("red apple", num_samples=5)
  sheet = cm3leon_jax.grid(samples)
  side, step = 128, 134
  assert sheet.size == (4 * step - 6, 2 * step - 6)
  fifth = sheet.crop((0, step, side, step + side)).resize((8, 8), Image.Resampling.NEAREST)
  np.testing.assert_array_equal(fifth, samples[4].image)
  shown = Image.open(io.BytesIO(samples[4]._repr_png_()))
  assert shown.size == (side, side)
  check_sentence(repr(samples[4]), "'red apple'", f"seed {samples[4].seed}", "neighbors")
  with refused(cm3leon_jax.UserError, "no images"):
    cm3leon_jax.grid([])
  facts = (str(run), "step 7", "8 x 8", "float32", "cpu", f"{model_size(model):,} parameters")
  check_sentence(repr(model), *facts)
  assert {"CM3Leon", "grid", "UserError"} <= set(dir(cm3leon_jax))


def model_size(model: CM3Leon) -> int:
  with jax.set_mesh(model.mesh):
    return sum(leaf.size for leaf in jax.tree.leaves(model._trained))


def test_samples_are_those_of_the_command(model, run, monkeypatch):
  monkeypatch.setattr(common, "use_mesh", lambda settings: one_device())
  prompts = ["red apple", "blue car"]
  asked = generate.Flags(prompt=prompts, guidance=("3",), retrieve=("2",), seed=5, samples=2)
  generate.main(SETTINGS, run, asked)
  (results,) = (run / "prompts").glob("red-apple-*/results.jsonl")
  records = [json.loads(line) for line in results.read_text().splitlines()]

  def samples(seed):
    found = model.generate(prompts, num_samples=2, guidance=3.0, retrieve=2, seed=seed)
    return [sample for of_prompt in found for sample in of_prompt]

  for sample, record in zip(samples(5), records, strict=True):
    assert sample.tokens.tolist() == record["tokens"]
    assert sample.clip_score == pytest.approx(record["clip_score"])
    assert [d.key for d in sample.neighbors] == [n["key"] for n in record["neighbors"]]
    np.testing.assert_allclose(sample.log_probs, record["log_probs"], atol=1e-4)
  assert [s.tokens.tolist() for s in samples(6)] != [r["tokens"] for r in records]


def test_an_image_may_be_given_in_any_form(model, tmp_path):
  IMAGE.save(tmp_path / "a.png")
  large = IMAGE.resize((32, 32), Image.Resampling.NEAREST).convert("CMYK")
  forms = (tmp_path / "a.png", str(tmp_path / "a.png"), IMAGE, np.asarray(IMAGE))
  captions = {model.caption(form, length=8) for form in forms}
  assert len(captions) == 1
  assert isinstance(model.caption(large, length=8), str)
  box = (2, 2, 6, 6)
  filled = model.infill([IMAGE, picture(1)], [box, (2, 0, 6, 4)])
  assert [image.size for image in filled] == [(8, 8), (8, 8)]


def pairs(model, images, texts) -> list[Document]:
  codes = model.pipeline.image_tokenizer.encode(np.stack([np.asarray(i) for i in images]))
  return [
    Document(
      f"d{i}",
      (Segment(False, model.pipeline.layout.encode(text)), Segment(True, VOCAB.image_ids(code))),
      *("s", "l", "a", "", f"concept {i}"),
    )
    for i, (text, code) in enumerate(zip(texts, codes))
  ]


@pytest.mark.parametrize(("retrieve", "condition"), [(0, "none"), (2, "true")])
def test_scores_are_the_bits_of_the_evaluation(model, run, tmp_path, retrieve, condition):
  texts, images = ["red apple", "an old blue house"], [IMAGE, picture(1)]
  write_documents(tmp_path / "pairs", pairs(model, images, texts), VOCAB)
  clip, layout = model.pipeline.clip, model.pipeline.layout
  with one_device():
    retriever = Retriever(run / "neighbors", SETTINGS.retrieval)
    ids, _ = retriever.retrieve(clip.embed_texts([layout.encode(text) for text in texts]))
    params, _ = reading.load_params(run / "train", SETTINGS.model)
    config = EvaluationConfig(num_documents=2, batch_size=4, num_resamples=100)
    stores = (
      DocumentStore(folder, VOCAB)
      for folder in (run / "documents" / "train_pairs", tmp_path / "pairs")
    )
    expected = bits.evaluate(
      params, SETTINGS.model, *stores, ids, VOCAB, SETTINGS.data, config, seed=0
    )

  def found(images):
    scores = model.score(texts, images, retrieve=retrieve)
    text, image = (
      -sum(getattr(s, name) for s in scores) / np.log(2) for name in ("text", "image_given_text")
    )
    return text / sum(s.text_tokens for s in scores), image / sum(s.image_tokens for s in scores)

  text, image = found(images)
  assert text == pytest.approx(expected["text"][condition]["bits"], rel=1e-5)
  assert image == pytest.approx(expected["image"][condition]["bits"], rel=1e-5)
  assert found(images[::-1])[1] != pytest.approx(image, rel=1e-3)
  alone = model.score(texts[1], images[1], retrieve=retrieve)
  assert alone.text == pytest.approx(
    model.score(texts, images, retrieve=retrieve)[1].text, rel=1e-5
  )


def test_the_score_of_a_text_given_its_image_is_that_of_the_masked_document(model, run):
  (document,) = pairs(model, [IMAGE], ["an old red apple"])
  text = len(document.segments[0].tokens)
  sample = apply_cm3_mask(join([document], VOCAB), [(1, 1 + text)], VOCAB)
  inputs = np.asarray(sample[:-1])[None]
  with one_device():
    params, _ = reading.load_params(run / "train", SETTINGS.model)
    places = np.arange(inputs.shape[1])[None]
    logits = model_logits(SETTINGS.model, params, inputs, places, np.ones_like(inputs))
    log_probs = np.asarray(jax.nn.log_softmax(logits))[0]
  of_targets = log_probs[np.arange(len(sample) - 1), sample[1:]]
  score = model.score("an old red apple", IMAGE)
  assert score.text_tokens == text
  assert score.text_given_image == pytest.approx(of_targets[-text - 1 : -1].sum(), rel=1e-4)
  assert score.text_given_image != pytest.approx(of_targets[-text:].sum(), rel=1e-3)
  assert score.text_given_image != pytest.approx(score.text, rel=1e-3)


def test_retrieved_documents_are_the_nearest_of_the_bank(model, run):
  found = model.retrieve("green car", k=5)
  clip, retriever = model.pipeline.clip, Retriever(run / "neighbors", SETTINGS.retrieval)
  query = clip.embed_texts([model.pipeline.layout.encode("green car")])
  cosines = retriever.bank.documents[:].astype(np.float32) @ query[0]
  store = DocumentStore(run / "documents" / "train_pairs", VOCAB)
  assert [d.key for d in found] == [store[int(i)].key for i in np.argsort(-cosines)[:5]]
  np.testing.assert_allclose([d.similarity for d in found], np.sort(cosines)[::-1][:5], atol=1e-5)
  ids, _ = retriever.retrieve(query)
  assert [d.key for d in found[:4]] == [store[int(i)].key for i in ids[0]]
  first = store[int(ids[0][0])]
  assert found[0].caption == model.pipeline.layout.decode(first.segments[0].tokens)
  codes = VOCAB.image_codes(first.segments[1].tokens)
  np.testing.assert_array_equal(
    found[0].image, model.pipeline.image_tokenizer.decode(codes[None])[0]
  )
  assert (found[0].source, found[0].license, found[0].attribution) == ("test", "CC0-1.0", "nobody")
  [sample] = model.generate("green car", retrieve=2)
  assert [d.key for d in sample.neighbors] == [d.key for d in found[:2]]
  texts = model.retrieve(["green car", "old house"], k=5)
  assert [d.key for d in texts[0]] == [d.key for d in found]
  assert [d.key for d in texts[1]] != [d.key for d in found]
  assert model.retrieve(IMAGE, k=1)[0].key == model.retrieve(np.asarray(IMAGE), k=1)[0].key


def every_call(model, word: str, seed: int) -> None:
  image = picture(seed)
  model.generate(f"a {word} apple", num_samples=4, guidance=2.0 + seed, seed=seed)
  model.caption(image, length=8, seed=seed)
  model.answer(image, [f"What {word} is it?", "What?"], length=8, seed=seed)
  model.infill(image, (2, 2, 6, 6), seed=seed)
  model.edit(image, f"make it {word}", seed=seed, temperature=1.0 + seed)
  model.interleave(f"{word}:", length=40, seed=seed)
  model.score(f"a {word} apple", image)
  model.score(f"a {word} apple", image, retrieve=1)
  model.retrieve(f"a {word} apple", k=2)
  model.retrieve(image, k=2)


def test_a_second_call_of_the_same_shape_compiles_nothing(model, compiled):
  every_call(model, "red", 0)
  compiled.clear()
  every_call(model, "blue", 1)
  assert compiled == []
  model.caption(IMAGE, length=9)
  assert compiled
