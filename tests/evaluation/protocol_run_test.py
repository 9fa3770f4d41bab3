import dataclasses
import shutil

from etils import epath
import numpy as np
import pytest

from cm3leon_jax.data.raw.reader import load_image
from cm3leon_jax.evaluation.metrics import extractors
from cm3leon_jax.evaluation.metrics.distances import frechet_distance
from cm3leon_jax.evaluation.protocols import protocol as protocol_lib
from cm3leon_jax.evaluation.protocols import results
from cm3leon_jax.evaluation.protocols import run as run_lib
from cm3leon_jax.evaluation.protocols import samples as samples_lib
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.reports import evaluation_page
from cm3leon_jax.run.run import Run
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
  likelihood]
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
def trained(tmp_path_factory):
  config = dataclasses.replace(SETTINGS.evaluation, num_resamples=100, batch_size=4)
  workdir = make_workdir(epath.Path(tmp_path_factory.mktemp("run")), SETTINGS)
  return Run(workdir, dataclasses.replace(SETTINGS, evaluation=config))


def measure(trained, folder, protocol=PROTOCOL):
  return run_lib.run(trained, "test", protocol, run_lib.Options(out=folder))


@pytest.fixture(scope="module")
def done(trained, tmp_path_factory):
  with one_device():
    job, result = measure(trained, tmp_path_factory.mktemp("done"))
    evaluation_page.write(job, result)
  return job, result


def test_numbers_are_the_same_again_and_after_a_kill_and_change_with_the_seed(
  trained, done, tmp_path
):
  folder = tmp_path / run_lib.FOLDER
  shutil.copytree(done[0].samples.parent, folder / "samples")
  [samples] = (folder / "samples").iterdir()
  samples_lib.part_path(samples, "best of two", 0).unlink()
  for path in samples.glob("features-*"):
    shutil.rmtree(path)
  job, again = measure(trained, tmp_path)
  assert again == done[1]
  assert job.samples == epath.Path(samples)
  other = dataclasses.replace(PROTOCOL, seed=1, metrics=("clip_score",))
  for column, found in measure(trained, tmp_path, other)[1]["columns"].items():
    assert found["metrics"]["clip_score"] != again["columns"][column]["metrics"]["clip_score"]


def test_distances_are_those_of_the_decoded_images(trained, done):
  job, result = done
  embed = extractors.load_clip("", trained.folder).embed
  features = embed(job.decode(samples_lib.read_part(job.samples, "one document", 0)))
  real = embed(np.stack([load_image(e.image, 8) for e in job.evaluated.examples]))
  found = result["columns"]["one document"]["metrics"]["frechet_distance"]["value"]
  assert found == pytest.approx(frechet_distance(features, real), rel=1e-6)
  assert found != pytest.approx(frechet_distance(features, features), abs=1e-3)


def test_the_best_of_several_samples_counts(done):
  job, _ = done
  every = samples_lib.read_json_lines(samples_lib.part_path(job.samples, "best of two", 0))
  best = samples_lib.read_lines(job.samples, "best of two", 5)
  assert len(every) == 10
  assert [line["row"] for line in best] == list(range(5))
  for line in best:
    scores = [x["clip_score"] for x in every if x["row"] == line["row"]]
    assert line["clip_score"] == max(scores) > min(scores)


def test_results_say_what_they_rest_on(done):
  job, result = done
  assert read_json(job.folder / results.RESULTS) == result
  assert (result["step"], result["examples"]) == (7, 5)
  assert result["extractor"]["network"] == "clip"
  assert len(result["data"]) == 64
  column = result["columns"]["one document"]
  assert column["sampling"]["guidance"] == 2.0
  assert column["divergence"] > 0
  score = column["metrics"]["clip_score"]
  assert score["low"] < score["value"] < score["high"]
  controls = result["controls"]
  assert set(controls[run_lib.REAL]) == {
    "clip_score",
    "frechet_distance",
    "kernel_distance",
    "cmmd",
  }
  assert "precision_recall" in controls[run_lib.NOISE]
  assert set(controls[run_lib.SHUFFLED]) == {"clip_score"}
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
  pages = []
  for text in ("a red cat", hostile.HOSTILE):
    examples = [
      dataclasses.replace(e, key=text, prompt=text, caption=text, references=(text,))
      for e in job.evaluated.examples
    ]
    evaluated = dataclasses.replace(job.evaluated, examples=examples)
    changed = dataclasses.replace(job, folder=epath.Path(tmp_path), evaluated=evaluated)
    evaluation_page.write(changed, {**result, "name": text})
    pages.append((tmp_path / evaluation_page.PAGE).read_text())
  hostile.check(pages[1], pages[0])


@pytest.mark.parametrize("count", [2, 3, 50])
def test_no_example_is_shuffled_onto_itself(count):
  for seed in range(20):
    found = run_lib.others(count, np.random.default_rng(seed))
    assert sorted(found) == list(range(count))
    assert (found != np.arange(count)).all()
