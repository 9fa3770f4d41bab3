import dataclasses
import json
import shutil

from etils import epath
import numpy as np
import pytest

from cm3leon_jax.data.raw.reader import load_image
from cm3leon_jax.evaluation.likelihood.pairs import score_answers
from cm3leon_jax.evaluation.metrics import extractors
from cm3leon_jax.evaluation.metrics.frechet_distance import frechet_distance
from cm3leon_jax.evaluation.protocols import protocol as protocol_lib
from cm3leon_jax.evaluation.protocols import results
from cm3leon_jax.evaluation.protocols import run as run_lib
from cm3leon_jax.evaluation.protocols import samples as samples_lib
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.reports import evaluation_page
from cm3leon_jax.retrieval.bank import load_clip
from cm3leon_jax.run.run import Run
from cm3leon_jax.weights import reading
from tests.evaluation.protocol_runs import make_workdir
from tests.generation.run import SETTINGS, one_device
from tests.reports import hostile

[PROTOCOL] = protocol_lib.parse(
  """
title: five drawings
task: image
data: {format: heldout, count: 5}
columns:
  - {name: one document, retrieve: 1, sampling: {guidance: 2.0}}
  - {name: best of two, samples: 2, sampling: {guidance: 1.0}}
metrics: [frechet_distance, kernel_distance, precision_recall, cmmd, clip_score,
  likelihood, vqa_score]
extractor: clip
published:
  - {model: another, source: a paper, column: best of two, clip_score: 0.5}
""",
  "test.yaml",
)


@pytest.fixture(autouse=True)
def mesh():
  with one_device():
    yield


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return make_workdir(epath.Path(tmp_path_factory.mktemp("run")), SETTINGS)


@pytest.fixture(scope="module")
def pipeline(workdir):
  with one_device():
    params, _ = reading.load_params(workdir / "train", SETTINGS.model)
    clip = load_clip("", workdir, SETTINGS.vocab)
    return params, Pipeline.load(Run(workdir, SETTINGS), params, clip, batch_size=4)


def make_job(workdir, pipeline, folder, protocol=PROTOCOL):
  params, pipe = pipeline
  return run_lib.ProtocolRun(
    protocol=protocol,
    metrics=protocol.metrics,
    pipeline=pipe,
    workdir=workdir,
    folder=epath.Path(folder),
    samples=epath.Path(folder),
    evaluated=samples_lib.open_evaluated(protocol, pipe, workdir, None),
    extractor=extractors.load_clip("", workdir),
    scorer=pipe.clip,
    scorer_identity=extractors.clip_identity(pipe.clip),
    params=params,
    num_resamples=100,
  )


@pytest.fixture(scope="module")
def done(workdir, pipeline, tmp_path_factory):
  with one_device():
    job = make_job(workdir, pipeline, tmp_path_factory.mktemp("done"))
    about = {"name": "test", "step": 7, "inputs": {"train": "t"}}
    result = results.write(job, about, run_lib.run(job))
    evaluation_page.write(job, result)
  return job, result


def test_every_number_is_the_same_when_it_is_run_again(workdir, pipeline, done, tmp_path):
  again = run_lib.run(make_job(workdir, pipeline, tmp_path))
  for field in ("columns", "controls"):
    assert json.dumps(again[field], sort_keys=True) == json.dumps(done[1][field], sort_keys=True)
  other = dataclasses.replace(PROTOCOL, seed=1)
  changed = run_lib.run(make_job(workdir, pipeline, tmp_path / "other", other))
  assert changed["columns"] != again["columns"]


def test_what_a_kill_left_out_is_generated_again(workdir, pipeline, done, tmp_path):
  job = make_job(workdir, pipeline, tmp_path)
  first = run_lib.run(job)
  samples_lib.part_path(tmp_path, "best of two", 0).unlink()
  (tmp_path / "features").rename(tmp_path / "old")
  assert run_lib.run(job) == first


def test_distances_are_those_of_the_decoded_images(done):
  job, result = done
  lines = samples_lib.read_part(job.folder, "one document", 0)
  codes = np.array([line["codes"] for line in lines])
  features = job.extractor.embed(job.pipeline.image_tokenizer.decode(codes))
  real = job.extractor.embed(np.stack([load_image(e.image, 8) for e in job.evaluated.examples]))
  found = result["columns"]["one document"]["metrics"]["frechet_distance"]["value"]
  assert found == pytest.approx(frechet_distance(features, real), rel=1e-6)
  assert found != pytest.approx(frechet_distance(features, features), abs=1e-3)


def test_the_best_of_several_samples_counts(done):
  job, _ = done
  every = samples_lib.read_json_lines(samples_lib.part_path(job.folder, "best of two", 0))
  best = list(samples_lib.read_lines(job.folder, "best of two", 5))
  assert len(every) == 10
  assert [line["row"] for line in best] == list(range(5))
  for line in best:
    scores = [x["clip_score"] for x in every if x["row"] == line["row"]]
    assert line["clip_score"] == max(scores) > min(scores)


def test_results_say_what_they_rest_on(done):
  job, result = done
  assert read_json(job.folder / results.RESULTS) == result
  assert result["extractor"]["network"] == "clip"
  assert len(result["data"]) == 64
  column = result["columns"]["one document"]
  assert column["sampling"]["guidance"] == 2.0
  assert column["divergence"] > 0
  score = column["metrics"]["clip_score"]
  assert score["low"] < score["value"] < score["high"]
  assert set(result["controls"]) == {run_lib.REAL, run_lib.NOISE, run_lib.SHUFFLED}
  assert "cmmd" in result["controls"][run_lib.NOISE]
  text = results.describe(result)
  assert "another, best of two (a paper): CLIP score 0.5" in text


def test_the_page_shows_numbers_and_examples(done):
  job, _ = done
  page = (job.folder / evaluation_page.PAGE).read_text()
  for text in ("five drawings", "best of two", "red apple", "a paper"):
    assert text in page
  assert page.count("data:image/png") == 5 * 3  # Five rows of three images.


def test_texts_of_strangers_are_inert_on_the_page(done, tmp_path):
  job, result = done
  folder = epath.Path(shutil.copytree(job.folder, tmp_path / "copy"))
  pages = []
  for text in ("a red cat", hostile.HOSTILE):
    examples = [
      dataclasses.replace(e, key=text, prompt=text, caption=text, references=(text,))
      for e in job.evaluated.examples
    ]
    evaluated = dataclasses.replace(job.evaluated, examples=examples)
    changed = dataclasses.replace(job, folder=folder, evaluated=evaluated)
    evaluation_page.write(changed, {**result, "name": text})
    pages.append((folder / evaluation_page.PAGE).read_text())
  hostile.check(pages[1], pages[0])


@pytest.mark.parametrize("count", [2, 3, 50])
def test_no_example_is_shuffled_onto_itself(count):
  for seed in range(20):
    found = run_lib.others(count, np.random.default_rng(seed))
    assert sorted(found) == list(range(count))
    assert (found != np.arange(count)).all()


def test_vqa_score_is_the_probability_of_yes_against_no(workdir, pipeline, tmp_path):
  job = make_job(workdir, pipeline, tmp_path, dataclasses.replace(PROTOCOL, metrics=("vqa_score",)))
  result = run_lib.run(job)
  for column in PROTOCOL.columns:
    lines = samples_lib.read_part(job.samples, column.name, 0)
    asked = 'Question: Does this figure show "{}"? Please answer yes or no. Answer: <mask>.'
    texts = [asked.format(line["prompt"]) for line in lines]
    codes = [line["codes"] for line in lines]
    scores = score_answers(job.pipeline, job.params, texts, [("yes", "no")] * len(lines), codes)
    expected = np.mean([np.exp(yes) / (np.exp(yes) + np.exp(no)) for yes, no in scores])
    found = result["columns"][column.name]["metrics"]["vqa_score"]
    assert found["value"] == pytest.approx(expected, rel=1e-4)
  shuffled = result["controls"]["shuffled"]["vqa_score"]["value"]
  first = result["columns"]["one document"]["metrics"]["vqa_score"]
  assert shuffled != first["value"]
  assert 0 < shuffled < 1
