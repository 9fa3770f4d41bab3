import dataclasses

from etils import epath
import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.config.data import RetrievalConfig
from cm3leon_jax.data.documents.store import group_id, write_documents
from cm3leon_jax.data.raw import reader
from cm3leon_jax.decoding.result import Result, sample_seed
from cm3leon_jax.errors import UserError
from cm3leon_jax.generation.image_tasks import TextToImage
from cm3leon_jax.generation.pipeline import Pipeline, check_tasks
from cm3leon_jax.generation.text_tasks import Caption, Interleaved
from cm3leon_jax.retrieval import neighbors
from cm3leon_jax.retrieval.bank import Embeddings, EmbedJob
from cm3leon_jax.run.run import Run
from cm3leon_jax.stages.shards import Runner
from tests.data.raw_folder import write_raw
from tests.data.stores import VOCAB
from tests.generation.run import SETTINGS, one_device
from tests.models.tiny import random_params
from tests.refusals import refused


def write_image(path, width=8, height=8):
  pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
  Image.fromarray(pixels).save(path)
  return str(path)


@pytest.fixture(scope="module")
def pipeline(workdir, clip):
  with one_device():
    return Pipeline.load(Run(workdir, SETTINGS), random_params(SETTINGS.model), clip, batch_size=2)


@pytest.fixture(autouse=True)
def mesh():
  with one_device():
    yield


def text_to_image(prompt, **fields):
  return TextToImage(prompt, **{"retrieve": 0, "sampling": SETTINGS.sampling, **fields})


def prepare(pipeline, *tasks):
  """Returns, for each task, its request and its neighbors."""
  given = check_tasks(pipeline.layout, tasks, pipeline.bank)
  found = pipeline.retrieve(tasks)
  return list(zip(pipeline.requests(tasks, given, found), found))


def test_a_bank_without_a_clip_is_not_searched(workdir):
  pipeline = Pipeline.load(Run(workdir, SETTINGS), random_params(SETTINGS.model))
  with refused(UserError, str(workdir), "--config.retrieval.clip=FOLDER"):
    pipeline.search([("text", "green car")], 1)


def test_a_prompt_gets_its_nearest_neighbors_by_clip(pipeline, workdir, clip):
  tasks = text_to_image("green car", retrieve=2), text_to_image("green car")
  (request, found), (_, none) = prepare(pipeline, *tasks)
  bank = Embeddings(workdir / "neighbors" / "train")
  scores = bank.documents[:] @ clip.embed_texts([pipeline.layout.encode("green car")])[0]
  assert bank.keys[:][np.argmax(scores)] == group_id(found[0].key)
  assert (len(found), none) == (2, ())
  first = [*found[0].segments[0].tokens, VOCAB.brk]
  assert request.streams[0][1 : 1 + len(first)].tolist() == first


def test_queries_are_those_of_the_stage(pipeline, clip, tmp_path):
  """Embeds held-out captions and images as `build_neighbors` does, with a lexical part, too."""
  config = RetrievalConfig(
    backend="exact", max_similarity=1.0, lexical_weight=0.5, lexical_width=32
  )
  captions = [f"a {color} {thing}" for color in ("red", "blue") for thing in ("car", "bell", "key")]
  splits = ["train", "train", "heldout"]
  write_raw(
    tmp_path / "raw",
    [{"key": f"k{i}", "caption": captions[i % 6], "split": splits[i % 3]} for i in range(12)],
    np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8),
  )
  job = EmbedJob(str(tmp_path / "raw"), str(tmp_path / "neighbors"), lambda: clip, 0.2, 0, {})
  neighbors.build_neighbors(config, job, SETTINGS.clip.embed_dim, {}, Runner())
  settings = dataclasses.replace(SETTINGS, retrieval=config)
  parts = pipeline.layout, pipeline.image_tokenizer, clip, tmp_path
  hybrid = Pipeline(random_params(SETTINGS.model), settings, *parts)
  pairs = reader.read_pairs(tmp_path / "raw", "heldout")
  queries = [("text", p.caption) for p in pairs] + [("image", p.image) for p in pairs]
  embedded, rows = hybrid._embed(queries), Embeddings(tmp_path / "neighbors" / "heldout")
  expected = np.concatenate([rows.queries[:], rows.images[:]])
  np.testing.assert_allclose(embedded, expected, atol=1e-3)
  ids = hybrid.retriever.retrieve(embedded[: len(pairs)])[0]
  stored = neighbors.load_neighbors(tmp_path / "neighbors", "heldout_pairs", text_only=True)
  np.testing.assert_array_equal(ids, stored)


def test_a_task_may_pad_its_image_instead_of_cutting_it(workdir, layout):
  class Padded(Caption):
    crop = "pad"

  wide = np.zeros((4, 8, 3), np.uint8)
  tasks = [Caption(wide, length=9), Padded(wide, length=9)]
  cut, padded = check_tasks(layout, tasks, workdir).values()
  assert cut.max() == 0
  assert (padded[[0, -1]] == 255).all()
  assert padded[3:5].max() == 0


def test_images_that_cannot_be_read_are_refused(workdir, layout, tmp_path):
  (tmp_path / "a.png").write_text("no image")
  for name in ("a.png", "b.png"):
    task = Caption(str(tmp_path / name), length=9, where="f, line 2")
    with refused(UserError, "f, line 2", name):
      check_tasks(layout, [task], workdir)


def test_an_empty_or_absent_bank_is_refused(pipeline, layout, tmp_path, monkeypatch):
  write_documents(epath.Path(tmp_path) / "documents" / "train_pairs", [], VOCAB)
  task = text_to_image("green car", retrieve=2, where="f, line 1")
  for bank, fact in ((tmp_path, "no documents"), (None, "no bank")):
    with refused(UserError, "f, line 1", fact):
      check_tasks(layout, [task], bank)

  def nothing(self, queries, count):
    shape = (len(queries), 4)
    return np.full(shape, -1, np.int32), np.zeros(shape, np.float32)

  monkeypatch.setattr(neighbors.Retriever, "retrieve", nothing)
  with refused(UserError, "f, line 1", "max_similarity"):
    prepare(pipeline, task)

  least = dataclasses.replace(pipeline.settings.retrieval, min_similarity=0.9)
  settings = dataclasses.replace(pipeline.settings, retrieval=least)
  monkeypatch.setattr(pipeline, "settings", settings)
  ((_, found),) = prepare(pipeline, task)
  assert found == ()  # No document is similar enough to the prompt.


class Brightness:
  """Fake CLIP whose scores are the brightness of the images."""

  resolution = 8

  def in_batches(self, size):
    return self

  def encode(self, text):
    return np.array([1], np.int32)

  def embed_images(self, images):
    return (images.mean(axis=(1, 2, 3))[:, None] / 255).astype(np.float32)

  def embed_texts(self, texts):
    return np.ones((len(texts), 1), np.float32)


def test_samples_are_ranked_by_their_scores(pipeline):
  tasks = [text_to_image(p, seed=3 + i, row=i) for i, p in enumerate(("red apple", "blue car"))]
  parts = random_params(SETTINGS.model), SETTINGS, pipeline.layout, pipeline.image_tokenizer
  bright = Pipeline(*parts, Brightness(), batch_size=2)
  batches = []
  plain = bright.generate(tasks, 3, on_batch=lambda samples: batches.append(len(samples)))
  ranked = bright.generate(tasks, 3, rank=True)
  assert batches == [2, 2, 2]
  for i, (task, of_task) in enumerate(zip(tasks, plain)):
    assert [(s.task, s.index, s.rank) for s in of_task] == [(task, n, None) for n in range(3)]
    assert [s.seed for s in of_task] == [sample_seed(3 + i, n) for n in range(3)]
  for before, after in zip(plain, ranked):
    assert [s.rank for s in after] == [1, 2, 3]
    scores = [s.clip_score for s in after]
    assert scores == sorted(scores, reverse=True)
    for sample in after:
      np.testing.assert_array_equal(sample.tokens, before[sample.index].tokens)
  assert [[s.index for s in x] for x in ranked] != [[0, 1, 2]] * 2
  assert len({tuple(s.tokens) for of_task in plain for s in of_task}) == 6
  # A sample does not depend on the batch.
  ((alone,),) = pipeline.generate(tasks[1:])
  np.testing.assert_array_equal(alone.tokens, plain[1][0].tokens)
  np.testing.assert_array_equal(np.asarray(alone.image), alone.segments[0])


def test_a_document_has_its_images_in_order(pipeline):
  task = Interleaved("red apple", length=60)
  ((request, _),) = prepare(pipeline, task)
  first, second = (VOCAB.image_ids(np.full(16, code)) for code in (3, 4))
  text = pipeline.layout.encode("blue car")
  brk = [VOCAB.brk]
  ids = np.concatenate([brk, first, brk, text, brk, second, [VOCAB.eos]]).astype(np.int32)
  result = Result(0, 0, 0, ids, np.zeros(len(ids), np.float32), False)
  (sample,) = pipeline.samples([0], [result], [task], [request], {}, [()])
  texts = [s if isinstance(s, str) else None for s in sample.segments]
  assert texts == ["red apple", None, "blue car", None]
  assert [codes.tolist() for codes in sample.codes] == [[3] * 16, [4] * 16]
  expected = pipeline.image_tokenizer.decode(np.stack(sample.codes))
  np.testing.assert_array_equal([np.asarray(image) for image in sample.images], expected)
  assert sample.text == "red apple\nblue car"


def test_a_bank_with_embeddings_of_other_documents_is_refused(pipeline, workdir, clip, tmp_path):
  documents = [pipeline.documents[i] for i in range(5)]
  write_documents(tmp_path / "documents" / "train_pairs", documents, VOCAB)
  (tmp_path / "neighbors").symlink_to(workdir / "neighbors")
  foreign = Pipeline.load(Run(workdir, SETTINGS), random_params(SETTINGS.model), clip, tmp_path)
  with refused(UserError, "12 documents", "5 documents"):
    prepare(foreign, text_to_image("green car", retrieve=1))
