import collections
import dataclasses

import pytest

from cm3leon_jax.commands import config_file
from cm3leon_jax.config.build import build
from cm3leon_jax.config.settings import SECTIONS, default_config, settings_from_config
from cm3leon_jax.configs import (
  cm3leon_7b,
  cm3leon_350m,
  cm3leon_760m,
  own,
  published_350m,
  sft_7b,
  sft_350m,
  sft_760m,
)
from cm3leon_jax.data.instructions.task_files import load_tasks
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import plain
from cm3leon_jax.mesh import create_mesh
from cm3leon_jax.planning.programs import count_params
from cm3leon_jax.run import bundles
from cm3leon_jax.run.source import Source, folder_of
from cm3leon_jax.stages import from_data
from examples.illustrations import config as illustrations
from examples.scenes import config as scenes
from examples.scenes import instruct as scenes_instruct
from examples.scenes import world as scene_world
from examples.scenes.options import COMMON, RARE, ScenesConfig

SIZES = {"350m": cm3leon_350m, "760m": cm3leon_760m, "7b": cm3leon_7b}
TUNED = {"350m": sft_350m, "760m": sft_760m, "7b": sft_7b}


@pytest.mark.parametrize(
  ("size", "layers", "width", "heads", "rate", "steps"),
  [
    ("350m", 24, 1_024, 16, 6e-4, 166_893),
    ("760m", 24, 1_536, 16, 5e-4, 226_498),
    ("7b", 32, 4_096, 32, 1.2e-4, 286_102),
  ],
)
def test_real_sizes_are_the_tutorials_and_the_papers(size, layers, width, heads, rate, steps):
  tutorial, paper = (
    settings_from_config(SIZES[size].get_config(variant)) for variant in ("", "paper")
  )
  for settings in (tutorial, paper):
    assert settings.vocab.size == settings.model.vocab_size == 64_512
    assert settings.data.sequence_length == 4_096
    model = settings.model
    assert (model.num_layers, model.width, model.num_heads) == (layers, width, heads)
    assert model.mlp_width == 4 * width
  assert (tutorial.vqgan.image_tokens, paper.vqgan.image_tokens) == (256, 1_024)
  assert (tutorial.optimizer.learning_rate, paper.optimizer.learning_rate) == (1e-4, rate)
  assert (tutorial.data.condition_dropout, paper.data.condition_dropout) == (0.1, 0.0)
  assert (tutorial.data.neighbor_dropout, paper.data.neighbor_dropout) == (0.1, 0.0)
  assert (tutorial.train.global_batch_size, paper.train.global_batch_size) == (8_192, 2_048)
  assert tutorial.train.steps * 8_192 * 4_096 == pytest.approx(1.4e12, rel=1e-4)
  assert paper.train.steps == steps


def test_no_shipped_config_names_a_source():
  """Prevents runs of a real size from training on generated drawings by default."""
  sources = {
    module.__name__.rpartition(".")[2]: module.get_config().raw.source
    for module in (*SIZES.values(), *TUNED.values(), own)
  }
  assert set(sources.values()) == {""}
  assert default_config().raw.source == ""


@pytest.mark.parametrize("variant", ["", "paper"])
@pytest.mark.parametrize("size", SIZES)
def test_a_tuning_is_the_papers_of_the_same_model_and_tokens(size, variant):
  tuned, pretrained = (
    settings_from_config(modules[size].get_config(variant)) for modules in (TUNED, SIZES)
  )
  changed = {name for name in SECTIONS if getattr(tuned, name) != getattr(pretrained, name)}
  assert changed == {"instructions", "optimizer", "train"}
  assert (tuned.optimizer.learning_rate, tuned.optimizer.warmup_steps) == (5e-5, 150)
  tokens_of_step = tuned.train.global_batch_size * tuned.data.sequence_length
  assert tokens_of_step == 2**21
  assert tuned.train.steps * tokens_of_step == pytest.approx(30e9, rel=1e-4)
  instructions = tuned.instructions
  assert (instructions.tasks, instructions.loss_on, instructions.replay_share) == (
    "cm3leon", "all", 0.0,
  )  # fmt: skip
  assert len(load_tasks(instructions)) > 20
  assert f"sft_{size}" in config_file.SHIPPED


def test_settings_come_back_from_json():
  modules = [*SIZES.values(), *TUNED.values()]
  variants = [(module, variant) for module in modules for variant in ("", "paper")]
  variants += [(scenes, variant) for variant in ("15", "long")]
  for module, variant in variants:
    settings = settings_from_config(module.get_config(variant))
    stored = plain(dataclasses.asdict(settings))
    assert settings_from_config(stored) == settings
    stored["seed"] += 1
    assert settings_from_config(stored) != settings


@pytest.mark.parametrize("demo", [scenes, scenes_instruct])
def test_minutes_scale_the_training_stages_and_nothing_else(demo):
  two, fifteen = (demo.get_config(v) for v in ("2", "15"))
  assert two.train.steps == round(fifteen.train.steps * 2 / 15)
  assert two.clip.steps == round(fifteen.clip.steps * 2 / 15) or demo is scenes_instruct
  scheduled = {"steps", "checkpoint_every", "eval_every", "sample_every"}
  for name in SECTIONS:
    for field in set(fifteen[name]) - scheduled:
      assert two[name][field] == fifteen[name][field]


def test_the_bundled_tuned_model_saw_more_records_half_of_them_redrawn():
  fifteen, long = (scenes_instruct.get_config(v) for v in ("15", "long"))
  for name in ("vocab", "vqgan", "model", "data"):
    assert fifteen[name] == long[name]
  assert fifteen.instructions.max_records < long.instructions.max_records
  assert (fifteen.instructions.redrawn, long.instructions.redrawn) == (0, 0.5)
  assert fifteen.train.steps < long.train.steps
  stored, step = bundles.read(folder_of("scenes-instruct"))
  settings = settings_from_config(long)
  ours = dataclasses.replace(settings.instructions, tasks=stored.instructions.tasks)
  assert (stored.instructions, stored.optimizer) == (ours, settings.optimizer)
  assert stored.instructions.instruction_first
  assert step == settings.train.steps
  with pytest.raises(ValueError, match="other"):
    scenes_instruct.get_config("other")


def test_the_world_that_needs_its_bank_shows_each_rare_object_where_training_and_evaluation_ask():
  world = build(ScenesConfig, scenes.get_config().raw.options, "raw.options")
  names = scene_world.rare_objects(world)
  assert len(names) == len(RARE)
  heldout = sum(map(scene_world.is_heldout_rare, names))
  common = len(COMMON)
  assert world.bank == 4 * common + len(names) + 3 * heldout
  counts = collections.Counter(
    (placed.object, placed.color)
    for scene in scene_world.bank_scenes(world)[: world.bank]
    for placed in scene.objects
  )
  assert len(counts) == common + len(names)  # Each image shows one color.
  assert collections.Counter(counts.values()) == {1: len(names) - heldout, 4: common + heldout}


@pytest.mark.parametrize(("variant", "codes", "most"), [("150", 144, 2.5e6), ("30", 64, 1.5e6)])
def test_illustrations_are_read_ten_times_by_a_small_decoder_with_one_neighbor(
  variant, codes, most
):
  settings = settings_from_config(illustrations.get_config(variant))
  longest = 2 * (1 + 24 + 1 + codes)  # Captions have at most 24 tokens, 7 on average.
  assert settings.vqgan.image_tokens == codes
  assert longest < settings.data.sequence_length < longest + 16
  assert most / 2 < count_params(settings, create_mesh(settings.mesh)) < most
  assert settings.train.steps * settings.train.global_batch_size > 10 * 5_683 * codes / 144
  with pytest.raises(UserError, match=r"examples/illustrations/config\.py"):
    config_file.load("illustrations")


def test_an_unknown_variant_is_refused():
  for module in (illustrations, scenes, own, published_350m, cm3leon_7b):
    with pytest.raises(ValueError, match="soon"):
      module.get_config("soon")


def test_the_config_for_own_images_leaves_to_the_data_what_follows_from_it():
  config = own.get_config()
  assert set(from_data.missing(config)) == {name for names in own.FOLLOW.values() for name in names}
  assert config.model.vocab_size is None
  assert (own.get_config("30").train.minutes, config.train.minutes) == (30.0, 15.0)
  assert Source.of(config.train.base).kind == "bundle"


def test_published_models_leave_the_decoder_of_350m_and_the_variant_counts_images():
  plain_size, ten, one = (
    settings_from_config(config)
    for config in (
      cm3leon_350m.get_config(), published_350m.get_config(), published_350m.get_config("1"),
    )
  )  # fmt: skip
  assert (ten.model, ten.vocab) == (plain_size.model, plain_size.vocab)
  assert (ten.vqgan.published, ten.vqgan.image_tokens) == ("amused", 256)
  assert ten.raw.resolution == ten.vqgan.resolution == 256
  assert ten.train.steps == pytest.approx(10 * one.train.steps, rel=1e-3)
  tokens = ten.train.steps * ten.train.global_batch_size * ten.data.sequence_length
  assert tokens == pytest.approx(1e7 * 3 * (256 + 26), rel=1e-3)
