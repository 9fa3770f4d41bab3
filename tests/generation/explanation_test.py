"""Tests explanations by the log-probabilities of sampling, and by another forward pass."""

import dataclasses

import jax
import numpy as np
import pytest

from cm3leon_jax.data.rows import loader
from cm3leon_jax.decoding import log_probs
from cm3leon_jax.errors import UserError
from cm3leon_jax.generation.image_tasks import TextToImage
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.generation.text_tasks import Caption
from cm3leon_jax.run.run import Run
from tests.generation.run import SETTINGS, one_device
from tests.models.tiny import model_logits, random_params
from tests.refusals import refused

UNGUIDED = dataclasses.replace(SETTINGS.sampling, guidance=1.0)
PARAMS = {}


def settings_of(aligned: bool):
  family = "modern" if aligned else "opt"
  model = dataclasses.replace(SETTINGS.model, family=family, align_images=aligned)
  retrieval = dataclasses.replace(SETTINGS.retrieval, max_similarity=1.0)
  return dataclasses.replace(SETTINGS, model=model, retrieval=retrieval)


@pytest.fixture(scope="module", params=[False, True], ids=["usual", "aligned"])
def pipeline(workdir, clip, request):
  settings = settings_of(request.param)
  with one_device():
    PARAMS[request.param] = random_params(settings.model)
    run = Run(workdir, settings)
    return Pipeline.load(run, PARAMS[request.param], clip, batch_size=4)


@pytest.fixture(autouse=True)
def mesh():
  with one_device():
    yield


def draw(pipeline):
  task = TextToImage("green car", retrieve=2, sampling=UNGUIDED, seed=3)
  [samples] = pipeline.generate([task], 2)
  return task, samples


def prompt_of(pipeline, task, documents):
  return task.to_request(pipeline.layout, neighbors=documents).streams[0]


def test_log_probs_equal_those_of_sampling_and_of_the_training_pass(pipeline):
  task, samples = draw(pipeline)
  layout, model = pipeline.layout, pipeline.settings.model
  for sample in samples:
    image = layout.vocab.image_ids(sample.codes[0])
    first, second = sample.neighbors
    rows = [
      np.concatenate([prompt_of(pipeline, task, kept), image]).astype(np.int32)
      for kept in ([first, second], [second], [first], [])
    ]
    found = log_probs.of_last_image(pipeline.generator, rows)
    np.testing.assert_allclose(found[0], sample.log_probs[: len(image)], atol=1e-4)
    length = max(map(len, rows))
    batch = loader.rows_of_samples(rows, length, layout.vocab, model.align_images)
    parts = (batch[name] for name in ("inputs", "positions", "segment_ids"))
    logits = model_logits(model, PARAMS[model.align_images], *parts)
    codes = jax.nn.log_softmax(logits[..., layout.vocab.text_size :])
    for row, (ids, one) in enumerate(zip(rows, found)):
      start = len(ids) - len(image) - 1
      expected = [codes[row, start + i, code] for i, code in enumerate(sample.codes[0])]
      np.testing.assert_allclose(one, expected, atol=1e-4)
    assert np.abs(found[0] - found[1]).max() > 0.01  # Negative control: documents matter.
    ratios = [one.ratios.ravel() for one in sample.explain()]
    np.testing.assert_allclose(ratios, [found[0] - found[1], found[0] - found[2]], atol=1e-4)


def test_an_influence_shows_its_document_and_its_squares(pipeline):
  _, [sample, _] = draw(pipeline)
  [one, _] = sample.explain()
  assert one.document is sample.neighbors[0]
  assert one.caption == pipeline.layout.decode(one.document.segments[0].tokens)
  side = pipeline.layout.side
  ratios = np.zeros((side, side), np.float32)
  ratios[0, 1], ratios[1, 0] = 9, -9
  marked = dataclasses.replace(one, ratios=ratios)
  assert np.argwhere(marked.squares).tolist() == [[0, 1]]
  colored, cell = np.asarray(marked.heat_map), sample.image.width // side
  assert (colored[:cell, cell : 2 * cell] == (214, 0, 108)).all()
  rest = colored.copy()
  rest[:cell, cell : 2 * cell] = 0
  assert (rest == rest[..., :1]).all()  # Gray.
  assert one.image.size == sample.image.size


def test_samples_without_documents_or_of_other_tasks_are_refused(pipeline):
  _, [sample, _] = draw(pipeline)
  caption = Caption(np.asarray(sample.image), length=3, retrieve=1)
  for change in ({"neighbors": ()}, {"task": caption}):
    one = dataclasses.replace(sample, **change)
    with refused(UserError, "text_to_image after retrieved documents"):
      one.explain()
