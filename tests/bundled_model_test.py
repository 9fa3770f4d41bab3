import pathlib

import jax
import numpy as np
import pytest

from cm3leon_jax import CM3Leon
from cm3leon_jax.config.build import build
from cm3leon_jax.config.settings import settings_from_config
from cm3leon_jax.run import bundles, initial
from cm3leon_jax.run.run import load_initial
from cm3leon_jax.run.source import folder_of
from examples.scenes import config as config_lib
from examples.scenes import instruct, instructions, source, world
from examples.scenes.judge import answers as scene_answers
from examples.scenes.judge.judge import judge_all
from examples.scenes.options import COMMON, ScenesConfig
from examples.scenes.world import Scene, split_of_scene
from tests.examples.scenes.records import records
from tests.models.tiny import mesh_of

MOST_WEIGHTS, MOST_BYTES, MOST_OF_A_FILE = 10_000_000, 17_000_000, 5_000_000


@pytest.fixture(scope="module")
def model():
  return CM3Leon.load("scenes", batch_size=32)


def heldout(reason):
  """Returns 32 scene pairs that are held out for the reason `reason`."""
  pairs = [source.pair(ScenesConfig(rare_objects=1_550), "heldout", i) for i in range(300)]
  pairs = [pair for pair in pairs if pair.facts["heldout"] == reason]
  assert len(pairs) >= 32
  return pairs[:32]


def right(samples, facts):
  images = np.stack([np.asarray(sample.image) for [sample] in samples])
  return np.mean([verdict.correct for verdict in judge_all(images, facts)])


def test_it_is_small_and_every_file_is_the_one_that_was_trained():
  folder = folder_of("scenes")
  bundles.read(folder)
  paths = [path for path in pathlib.Path(folder).rglob("*") if path.is_file()]
  sizes = {path: path.stat().st_size for path in paths}
  assert max(sizes.values()) < MOST_OF_A_FILE
  assert sum(sizes.values()) <= MOST_BYTES
  of_models = [size for path, size in sizes.items() if path.suffix == ".safetensors"]
  assert len(of_models) == 4
  assert sum(of_models) <= MOST_WEIGHTS


def test_a_tuning_starts_from_it_by_its_name_on_any_mesh():
  settings = settings_from_config(instruct.get_config())
  found = initial.find(settings, "scenes")
  assert (found.source, found.step) == ("scenes", None)
  loaded = []
  for shape in ((1, 1, 1), (2, 4, 1)):
    with jax.set_mesh(mesh_of(*shape)):
      loaded.append(jax.device_get(load_initial(found, settings)))
  jax.tree.map(np.testing.assert_array_equal, *loaded)
  assert loaded[0]["embed"].std() > 0.01


def test_it_never_trained_on_what_other_runs_of_scenes_hold_out():
  options = build(ScenesConfig, config_lib.get_config("long").raw.options, "raw.options")
  trained = [source.pair(options, "train", i).image for i in range(1_000)]
  # Runs whose rare objects have one place do not train on those at other places, nor hold them out.
  assert {split_of_scene(Scene.parse(image)) for image in trained} == {"train", "bank"}
  places = options.rare_places
  assert {split_of_scene(Scene.parse(image), places) for image in trained} == {"train"}
  others = (ScenesConfig(), ScenesConfig(seed=7, objects=tuple(COMMON)[:20], rare_objects=300))
  for config in others:
    heldout = [source.pair(config, "heldout", i).image for i in range(140)]
    assert {split_of_scene(Scene.parse(image)) for image in heldout} == set(world.KINDS)


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_its_images_show_what_captions_of_new_scenes_say(model):
  pairs = heldout("scene")
  facts = [pair.facts for pair in pairs]
  samples = model.generate([pair.caption for pair in pairs], seed=0)
  assert right(samples, facts) >= 0.7
  # Negative control: the judge checks each image against the next caption, which seldom fits.
  assert right(samples, facts[1:] + facts[:1]) <= 0.1


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_it_draws_objects_that_it_never_saw_from_its_bank_alone(model):
  pairs = heldout("rare")
  captions, facts = [pair.caption for pair in pairs], [pair.facts for pair in pairs]
  samples = model.generate(captions, seed=0)
  assert all(
    sample.neighbors[0].facts["objects"][0]["class"] in fact["counts"]
    for [sample], fact in zip(samples, facts)
  )
  assert right(samples, facts) >= 0.45
  assert right(model.generate(captions, seed=0, retrieve=0), facts) <= 0.1


TUNED = "scenes-instruct"
EACH = 8  # Number of held-out records per task.


@pytest.fixture(scope="module")
def tuned():
  return CM3Leon.load(TUNED, batch_size=32)


def records_of(tasks):
  config = ScenesConfig(rare_objects=1_550)
  return [x for task in tasks for x in records(config, task, "heldout", EACH)]


def test_the_tuned_one_is_a_decoder_on_the_files_of_the_other():
  folder = pathlib.Path(folder_of(TUNED))
  bundles.read(folder)
  assert pathlib.Path(bundles.stages_folder(folder)) == pathlib.Path(folder_of("scenes"))
  sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
  assert max(sizes.values()) < MOST_OF_A_FILE
  assert sum(sizes.values()) < 6_000_000
  assert sum(path.suffix == ".safetensors" for path in sizes) == 2
  assert bundles.about(folder)["cost"]["train_seconds"] > 600


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_the_tuned_one_answers_questions_about_new_scenes(tuned):
  records = records_of(instructions.QUESTIONS)
  images = [record.images["image"] for record in records]
  answers = tuned.answer(images, [record.texts["question"] for record in records])

  def share_of_right(records):
    return np.mean([scene_answers.is_right(*pair) for pair in zip(records, answers)])

  assert share_of_right(records) >= 0.6
  # Negative control: each answer is checked against a question of another task.
  assert share_of_right(records[EACH:] + records[:EACH]) <= 0.1


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_the_tuned_one_edits_new_scenes(tuned):
  records = records_of(instructions.EDITS)
  before = [np.asarray(record.images["before"]) for record in records]
  after = tuned.edit(before, [record.texts["instruction"] for record in records])

  def share_of_right(images):
    verdicts = scene_answers.judge_images(records, np.stack([np.asarray(x) for x in images]))
    return np.mean([verdict.correct for verdict in verdicts])

  assert share_of_right(after) >= 0.45
  assert share_of_right(before) == 0
  # Replaces the input images by tokenizer reconstructions, because generated images come from it.
  tokenizer = tuned.pipeline.image_tokenizer
  drawn = list(tokenizer.decode(tokenizer.encode(np.stack(before))))
  edited = tuned.edit(drawn, [record.texts["instruction"] for record in records])
  assert share_of_right(edited) >= 0.45
