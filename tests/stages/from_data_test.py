import dataclasses

from ml_collections import config_dict
import pytest

from cm3leon_jax.commands import config_file
from cm3leon_jax.config.instructions import InstructionsConfig
from cm3leon_jax.config.settings import default_config, settings_from_config
from cm3leon_jax.configs import own
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.stages import from_data, table
from cm3leon_jax.stages.from_data import Counts
from examples.illustrations import config as illustrations
from tests.launched import SCENES
from tests.refusals import refused

COUNTS = Counts(48, 264, 0, 0, 7_360, 0, 358)


def config_without(*names, minutes=15.0):
  """Returns the default config without some fields, which are then computed from the data."""
  config = default_config()
  config.train.minutes = minutes
  config.raw.resolution = 0
  for name in names:
    section, field = name.split(".")
    kind = type(config[section][field])
    del config[section][field]
    config[section][field] = config_dict.placeholder(kind)
  return config


def prepared(workdir, counts=COUNTS):
  (workdir / "raw").mkdir()
  about = {"summary": {from_data.COUNTS: dataclasses.asdict(counts)}}
  write_json(workdir / "raw" / "done.json", about)


def test_all_fields_follow_from_the_counts_of_300_images():
  assert from_data.values(COUNTS, 15.0) == {
    "vocab.text_size": 358,
    "data.text_share": 0.0,
    "data.sequence_length": 320,
    "model.max_positions": 320,
    "vqgan.resolution": 48,
    "clip.resolution": 48,
    "vqgan.batch_size": 16,
    "clip.batch_size": 128,
    "vqgan.steps": 2_779,
    "clip.steps": 111,
    "train.steps": 3_088,
    "train.checkpoint_every": 257,
    "train.eval_every": 386,
    "train.sample_every": 1_029,
    "data.base_documents": 0,
    "data.base_share": 0.0,
    "train.patience": 3,
  }


def test_only_fields_that_are_none_get_values_and_flags_win(tmp_path):
  prepared(tmp_path)
  config = config_without("vocab.text_size", "train.steps")
  config.train.steps = 7
  made = from_data.complete(config, tmp_path)
  assert (made.vocab.text_size, made.train.steps) == (358, 7)
  assert made.vqgan.resolution == default_config().vqgan.resolution
  assert config.vocab.text_size is None


def test_data_that_is_not_prepared_is_named_with_its_command(tmp_path):
  config = config_without("vocab.text_size")
  for workdir in (tmp_path, None):
    with refused(UserError, "vocab.text_size", "prepare_data"):
      from_data.complete(config, workdir)
    assert from_data.complete(config, workdir, prepares=True).vocab.text_size > 0
  (tmp_path / "raw").mkdir()
  write_json(tmp_path / "raw" / "done.json", {"summary": {"train_pairs": 3}})
  with refused(UserError, "raw", "vocab.text_size"):
    from_data.complete(config, tmp_path)


def test_a_field_that_does_not_follow_from_the_data_is_named(tmp_path):
  prepared(tmp_path)
  with refused(UserError, "model.width"):
    from_data.complete(config_without("model.width"), tmp_path)


def test_a_wrong_resolution_is_refused_before_the_data_is_prepared(tmp_path):
  config = own.get_config()
  config.raw.resolution = 98
  with pytest.raises(UserError, match=r"raw\.resolution is 98;.*downsample = 4, such as 96\."):
    from_data.complete(config, tmp_path, prepares=True)
  config.raw.resolution = 96
  made = from_data.complete(config, tmp_path, prepares=True)
  assert made.vqgan.resolution == made.clip.resolution == 96


def test_another_resolution_than_that_of_the_data_is_named(tmp_path):
  """Regression: the stored resolution won, so that the sentence stayed after a correction."""
  prepared(tmp_path, dataclasses.replace(COUNTS, resolution=60))
  config = own.get_config()
  config.raw.resolution = 96
  for prepares in (True, False):
    with pytest.raises(UserError, match=r"raw\.resolution: 60 -> 96\): use another --workdir, or"):
      from_data.complete(config, tmp_path, prepares=prepares)
  # The base's resolution replaces that of a config file.
  fields = from_data.parent_fields(base_of(vqgan={"resolution": 60}), documents=True)
  made = from_data.complete(config, tmp_path, of_parent=fields)
  assert (made.raw.resolution, made.vqgan.resolution) == (60, 60)


def base_of(**sections):
  """Returns the sections of a base: the demo's config with some other fields."""
  config = config_file.load(SCENES)
  config.model.width = 192
  config.optimizer.learning_rate = 1e-3
  found = dataclasses.asdict(settings_from_config(config))
  return {name: {**found[name], **sections.get(name, {})} for name in found if name != "seed"}


def copied(workdir, fields):
  (workdir / "text_tokenizer").mkdir()
  write_json(workdir / "text_tokenizer" / "done.json", {"summary": {from_data.OF_PARENT: fields}})


def tuned(workdir, **fields):
  """Prepares the data of a run that is tuned from `base_of()`, and returns the config `own`."""
  prepared(workdir)
  copied(workdir, from_data.parent_fields(base_of(), documents=True) | fields)
  return config_file.load("own")


def test_a_run_has_the_model_and_tokenizers_of_its_base_and_its_own_documents(tmp_path):
  base = base_of(data={"text_share": 0.6}, instructions={"instruction_first": True})
  fields = from_data.parent_fields(base, documents=True)
  prepared(tmp_path)
  copied(tmp_path, fields)
  found = settings_from_config(from_data.complete(config_file.load("own"), tmp_path))
  expected = settings_from_config({**config_file.load(SCENES).to_dict(), **base, "seed": 0})
  for name in ("vocab", "model", "clip", "text_tokenizer", "sampling"):
    ours, theirs = (dataclasses.asdict(getattr(one, name)) for one in (found, expected))
    assert {**ours, "steps": 0} == {**theirs, "steps": 0}
  assert table.identity(found, "vqgan") == table.identity(expected, "vqgan")
  assert found.optimizer.learning_rate == pytest.approx(1e-3 / 3)
  assert found.raw.resolution == 48
  assert found.raw.source == ""
  assert found.instructions == InstructionsConfig(instruction_first=True)
  data = dataclasses.replace(expected.data, text_share=0.0, base_documents=4_000, base_share=0.1)
  assert found.data == data
  without = from_data.parent_fields(base, documents=False)
  assert (without["data.base_documents"], without["data.base_share"]) == (0, 0.0)


@pytest.mark.parametrize(
  ("side", "characters", "length"), [(48, 28, 320), (48, 120, 416), (64, 28, 544)]
)
def test_a_row_has_space_for_two_documents_and_its_length_decides_the_steps(
  side, characters, length, tmp_path
):
  counts = dataclasses.replace(COUNTS, resolution=side, caption_characters=264 * characters)
  prepared(tmp_path, counts)
  found = settings_from_config(from_data.complete(own.get_config(), tmp_path))
  assert (found.data.sequence_length, found.model.max_positions) == (length, length)
  longest = 2 * (found.vqgan.image_tokens + 4 + 1.5 * characters / 4)
  assert longest <= length < longest + 32
  assert found.train.steps == pytest.approx(3_088 * 1_024 / (3 * length), rel=1e-3)


@pytest.mark.parametrize(
  ("given", "counts", "length"),
  [
    ([], COUNTS, 352),
    ([], dataclasses.replace(COUNTS, caption_characters=264 * 120), 416),
    (["raw.resolution"], dataclasses.replace(COUNTS, resolution=64), 544),
  ],
)
def test_rows_and_resolution_of_a_base_with_a_tokenizer_for_any_image_follow_the_data(
  given, counts, length, tmp_path
):
  base = dataclasses.asdict(settings_from_config(illustrations.get_config()))
  prepared(tmp_path, counts)
  copied(tmp_path, from_data.parent_fields(base, documents=False))
  config = own.get_config()
  config.raw.resolution = 64 if given else 0
  found = settings_from_config(from_data.complete(config, tmp_path, given=given))
  expected = {**base["model"], "max_positions": length}
  assert dataclasses.asdict(found.model) == expected
  assert dataclasses.asdict(found.vocab) == base["vocab"]
  assert (found.data.sequence_length, found.vqgan.resolution) == (length, counts.resolution)
  assert (found.vqgan.source, found.vqgan.downsample) == ("pictures", 4)
  assert found.clip.resolution == 48


def test_a_base_names_no_function_of_the_config(tmp_path):
  """Otherwise a workdir of a stranger would have files of the stranger imported."""
  evil = dict.fromkeys(("raw.source", "evaluation.judge", "reinforce.reward"), "/evil.py:f")
  config = tuned(tmp_path, **evil)
  found = settings_from_config(from_data.complete(config, tmp_path))
  assert found.model.width == 192
  names = (found.raw.source, found.evaluation.judge, found.reinforce.reward)
  assert names == (config.raw.source, config.evaluation.judge, config.reinforce.reward)
  assert "/evil.py:f" not in names


def test_a_field_that_the_user_sets_does_not_follow_the_base(tmp_path):
  config = tuned(tmp_path)
  config.data.base_share, config.optimizer.learning_rate = 0.5, 7e-4
  given = ["data.base_share", "optimizer.learning_rate"]
  config.data.base_documents = 30
  found = from_data.complete(config, tmp_path, given=given)
  assert (found.data.base_share, found.optimizer.learning_rate) == (0.5, 7e-4)
  assert found.data.base_documents == 30
  assert found.model.width == 192


def test_adapters_have_a_higher_rate_and_a_tuning_on_instructions_takes_all_steps(tmp_path):
  config = tuned(tmp_path)
  full = from_data.complete(config, tmp_path)
  config.adapter.rank = 16
  adapted = from_data.complete(config, tmp_path)
  rates = [one.optimizer.learning_rate for one in (full, adapted)]
  assert rates[1] == pytest.approx(from_data.ADAPTER_RATE * rates[0])
  given = from_data.complete(config, tmp_path, given=["optimizer.learning_rate"])
  assert given.optimizer.learning_rate == config.optimizer.learning_rate
  config.instructions.tasks = "tasks.yaml"
  assert (full.train.patience, from_data.complete(config, tmp_path).train.patience) == (3, 0)
