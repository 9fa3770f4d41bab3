import contextlib
import dataclasses
import pathlib
import pickle
import time

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
import jax
import pytest

from cm3leon_jax.config import FieldError, UserError
from cm3leon_jax.reports import config_reference
from cm3leon_jax.settings import SECTIONS, Settings, default_config, describe, settings_from_config
from tests.messages import refused


def settings_with(**fields) -> Settings:
  """The defaults but for some fields, e.g. `train__steps=3`."""
  config = default_config().to_dict()
  for name, value in fields.items():
    section, _, field = name.partition("__")
    if field:
      config[section][field] = value
    else:
      config[section] = value
  return settings_from_config(config)


POSITIVE = "greater than 0"
NOT_NEGATIVE = "at least 0"
AT_MOST_1 = "at most 1"
BELOW_1 = "less than 1"

# A value just out of range for every bound of every field, and the bound.
REFUSED = [
  ("vocab", "num_special", 5, "at least 6"),
  ("vocab", "text_size", 0, POSITIVE),
  ("vocab", "image_size", 0, POSITIVE),
  ("raw", "format", "zip", "'auto', 'folder', 'sidecars', 'webdataset', 'parquet' or 'text'"),
  ("raw", "licenses", (3,), "a valid string"),
  ("raw", "max_caption_characters", 0, POSITIVE),
  ("raw", "max_rejected", -0.1, NOT_NEGATIVE),
  ("raw", "max_rejected", 1.1, AT_MOST_1),
  ("raw", "resolution", -1, NOT_NEGATIVE),
  ("raw", "crop", "left", "'center' or 'pad'"),
  ("raw", "crops", -2, "at least -1"),
  ("raw", "crops", 1_000, "at most 999"),
  ("raw", "jpeg_quality", -1, NOT_NEGATIVE),
  ("raw", "jpeg_quality", 96, "at most 95"),
  ("raw", "heldout_fraction", -0.1, NOT_NEGATIVE),
  ("raw", "heldout_fraction", 1.0, BELOW_1),
  ("raw", "num_threads", 0, POSITIVE),
  ("scenes", "train", 0, POSITIVE),
  ("scenes", "heldout", 0, POSITIVE),
  ("scenes", "bank", -1, NOT_NEGATIVE),
  ("scenes", "objects", (3,), "a valid string"),
  ("scenes", "colors", (3,), "a valid string"),
  ("scenes", "categories", (3,), "a valid string"),
  ("scenes", "shares", (0.0,), POSITIVE),
  ("scenes", "rare_objects", -1, NOT_NEGATIVE),
  ("scenes", "style", "dotted", "'filled' or 'outlined'"),
  ("scenes", "seed", -1, NOT_NEGATIVE),
  ("text_tokenizer", "min_frequency", 0, POSITIVE),
  ("text_tokenizer", "model_max_length", 0, POSITIVE),
  ("text_tokenizer", "max_caption_tokens", 0, POSITIVE),
  ("vqgan", "resolution", 0, POSITIVE),
  ("vqgan", "downsample", 0, POSITIVE),
  ("vqgan", "stem", 0, POSITIVE),
  ("vqgan", "width", 0, POSITIVE),
  ("vqgan", "multipliers", (1, 0, 4), POSITIVE),
  ("vqgan", "encoder_blocks", (1, -1, 1), NOT_NEGATIVE),
  ("vqgan", "decoder_blocks", (1, -1, 1), NOT_NEGATIVE),
  ("vqgan", "local_codes", 1, "a valid boolean"),
  ("vqgan", "code_dim", 0, POSITIVE),
  ("vqgan", "quantizer", "lfq", "'' or 'fsq'"),
  ("vqgan", "steps", 0, POSITIVE),
  ("vqgan", "batch_size", 0, POSITIVE),
  ("vqgan", "learning_rate", 0.0, POSITIVE),
  ("vqgan", "warmup_steps", -1, NOT_NEGATIVE),
  ("vqgan", "l1_weight", -0.1, NOT_NEGATIVE),
  ("vqgan", "l2_weight", -0.1, NOT_NEGATIVE),
  ("vqgan", "multiscale_weight", -0.1, NOT_NEGATIVE),
  ("vqgan", "gradient_weight", -0.1, NOT_NEGATIVE),
  ("vqgan", "perceptual_weight", -0.1, NOT_NEGATIVE),
  ("vqgan", "codebook_weight", -0.1, NOT_NEGATIVE),
  ("vqgan", "commitment_weight", -0.1, NOT_NEGATIVE),
  ("vqgan", "adversarial_weight", -0.1, NOT_NEGATIVE),
  ("vqgan", "adversarial_adaptive", 1, "a valid boolean"),
  ("vqgan", "adversarial_start", -0.1, NOT_NEGATIVE),
  ("vqgan", "adversarial_start", 1.1, AT_MOST_1),
  ("vqgan", "discriminator_width", 0, POSITIVE),
  ("vqgan", "discriminator_layers", 0, POSITIVE),
  ("vqgan", "discriminator_layers", 17, "at most 16"),
  ("vqgan", "restart_every", -1, NOT_NEGATIVE),
  ("vqgan", "restart_until", -0.1, NOT_NEGATIVE),
  ("vqgan", "restart_until", 1.1, AT_MOST_1),
  ("vqgan", "ema_decay", -0.1, NOT_NEGATIVE),
  ("vqgan", "ema_decay", 1.0, BELOW_1),
  ("vqgan", "checkpoint_every", 0, POSITIVE),
  ("clip", "resolution", 0, POSITIVE),
  ("clip", "image_encoder", "resnet", "'vit' or 'conv'"),
  ("clip", "patch", 0, POSITIVE),
  ("clip", "image_width", 0, POSITIVE),
  ("clip", "image_width", 65, "a multiple of 64"),
  ("clip", "image_layers", 0, POSITIVE),
  ("clip", "text_width", 0, POSITIVE),
  ("clip", "text_width", 65, "a multiple of 64"),
  ("clip", "text_layers", 0, POSITIVE),
  ("clip", "text_length", 0, POSITIVE),
  ("clip", "embed_dim", 0, POSITIVE),
  ("clip", "steps", 0, POSITIVE),
  ("clip", "batch_size", 1, "at least 2"),
  ("clip", "learning_rate", 0.0, POSITIVE),
  ("clip", "warmup_fraction", -0.1, NOT_NEGATIVE),
  ("clip", "warmup_fraction", 1.0, BELOW_1),
  ("clip", "weight_decay", -0.1, NOT_NEGATIVE),
  ("clip", "text_dropout", -0.1, NOT_NEGATIVE),
  ("clip", "text_dropout", 1.0, BELOW_1),
  ("clip", "shift", -0.1, NOT_NEGATIVE),
  ("clip", "shift", 1.0, BELOW_1),
  ("clip", "color_jitter", -0.1, NOT_NEGATIVE),
  ("clip", "color_jitter", 1.0, BELOW_1),
  ("clip", "checkpoint_every", 0, POSITIVE),
  ("retrieval", "backend", "faiss", "'auto', 'scann' or 'exact'"),
  ("retrieval", "max_candidates", 0, POSITIVE),
  ("retrieval", "kept_per_side", 0, POSITIVE),
  ("retrieval", "max_similarity", -1.1, "at least -1"),
  ("retrieval", "max_similarity", 1.1, AT_MOST_1),
  ("retrieval", "min_similarity", -1.1, "at least -1"),
  ("retrieval", "min_similarity", 1.1, AT_MOST_1),
  ("retrieval", "index_rows", 0, POSITIVE),
  ("retrieval", "train_documents", 1, "a valid boolean"),
  ("retrieval", "query_dropout", -0.1, NOT_NEGATIVE),
  ("retrieval", "query_dropout", 1.0, BELOW_1),
  ("retrieval", "lexical_weight", -0.1, NOT_NEGATIVE),
  ("retrieval", "lexical_weight", 1.0, BELOW_1),
  ("retrieval", "lexical_width", 0, POSITIVE),
  ("data", "sequence_length", 1, "at least 2"),
  ("data", "num_neighbors", -1, NOT_NEGATIVE),
  ("data", "neighbor_sampling", "nearest", "'fixed', 'paper', 'uniform' or 'best'"),
  ("data", "neighbor_dropout", -0.1, NOT_NEGATIVE),
  ("data", "neighbor_dropout", 1.1, AT_MOST_1),
  ("data", "condition_dropout", -0.1, NOT_NEGATIVE),
  ("data", "condition_dropout", 1.1, AT_MOST_1),
  ("data", "code_dropout", -0.1, NOT_NEGATIVE),
  ("data", "code_dropout", 1.1, AT_MOST_1),
  ("data", "code_dropout_alone", -0.1, NOT_NEGATIVE),
  ("data", "code_dropout_alone", 1.1, AT_MOST_1),
  ("data", "mean_spans", -0.1, NOT_NEGATIVE),
  ("data", "whole_segment_rate", -0.1, NOT_NEGATIVE),
  ("data", "whole_segment_rate", 1.1, AT_MOST_1),
  ("data", "neighbor_loss_weight", -0.1, NOT_NEGATIVE),
  ("data", "text_share", -0.1, NOT_NEGATIVE),
  ("data", "text_share", 1.1, AT_MOST_1),
  ("data", "interleaved_share", -0.1, NOT_NEGATIVE),
  ("data", "interleaved_share", 1.1, AT_MOST_1),
  ("data", "pack_window", 0, POSITIVE),
  ("data", "read_threads", 0, POSITIVE),
  ("data", "on_bad_record", "ignore", "'raise' or 'skip'"),
  ("data", "max_skipped", -1, NOT_NEGATIVE),
  ("instructions", "own_tasks", 3, "a tuple of tasks, each a dict of fields."),
  ("instructions", "only", (3,), "a valid string"),
  ("instructions", "max_records", -1, NOT_NEGATIVE),
  ("instructions", "loss_on", "answer", "'all' or 'target'"),
  ("instructions", "replay_share", -0.1, NOT_NEGATIVE),
  ("instructions", "replay_share", 1.0, BELOW_1),
  ("instructions", "least_ratio", 0.0, POSITIVE),
  ("instructions", "most_ratio", 0.0, POSITIVE),
  ("model", "family", "gpt", "'opt' or 'modern'"),
  ("model", "vocab_size", 0, POSITIVE),
  ("model", "num_layers", 0, POSITIVE),
  ("model", "width", 0, POSITIVE),
  ("model", "num_heads", 0, POSITIVE),
  ("model", "head_size", -1, NOT_NEGATIVE),
  ("model", "rope_base", -1.0, NOT_NEGATIVE),
  ("model", "mlp_width", 0, POSITIVE),
  ("model", "max_positions", 0, POSITIVE),
  ("model", "align_images", 1, "a valid boolean"),
  ("model", "activation", "silu", "'', 'gelu_tanh' or 'gelu'"),
  ("model", "init_std", 0.0, POSITIVE),
  ("model", "embed_std", 0.0, POSITIVE),
  ("model", "codebook_start", -0.1, NOT_NEGATIVE),
  ("model", "codebook_start", 1.1, AT_MOST_1),
  ("model", "dtype", "float16", "'float32', 'bfloat16' or 'float64'"),
  ("model", "remat_policy", "some", "'none', 'minimal', 'save_qkv'"),
  ("model", "attention", "flash", "'auto', 'plain', 'splash' or 'triton'"),
  ("model", "loss_chunk", 0, POSITIVE),
  ("mesh", "data", -2, "at least -1"),
  ("mesh", "fsdp", -2, "at least -1"),
  ("mesh", "tensor", -2, "at least -1"),
  ("mesh", "fsdp_inner", -2, "at least -1"),
  ("optimizer", "learning_rate", 0.0, POSITIVE),
  ("optimizer", "warmup_steps", -1, NOT_NEGATIVE),
  ("optimizer", "name", "adam", "'adamw' or 'muon'"),
  ("optimizer", "schedule", "step", "'cosine' or 'linear'"),
  ("instructions", "redrawn", -0.1, NOT_NEGATIVE),
  ("instructions", "redrawn", 1.1, AT_MOST_1),
  ("optimizer", "final_fraction", -0.1, NOT_NEGATIVE),
  ("optimizer", "final_fraction", 1.1, AT_MOST_1),
  ("optimizer", "b1", -0.1, NOT_NEGATIVE),
  ("optimizer", "b1", 1.1, AT_MOST_1),
  ("optimizer", "b2", -0.1, NOT_NEGATIVE),
  ("optimizer", "b2", 1.1, AT_MOST_1),
  ("optimizer", "eps", 0.0, POSITIVE),
  ("optimizer", "weight_decay", -0.1, NOT_NEGATIVE),
  ("optimizer", "clip_norm", 0.0, POSITIVE),
  ("optimizer", "skip_above", -0.1, NOT_NEGATIVE),
  ("optimizer", "first_moment_dtype", "float16", "'float32' or 'bfloat16'"),
  ("optimizer", "z_loss", -0.1, NOT_NEGATIVE),
  ("optimizer", "ema_decay", -0.1, NOT_NEGATIVE),
  ("optimizer", "ema_decay", 1.0, BELOW_1),
  ("train", "steps", 0, POSITIVE),
  ("train", "global_batch_size", 0, POSITIVE),
  ("train", "gradient_accumulation_steps", 0, POSITIVE),
  ("train", "rows_per_device", -1, NOT_NEGATIVE),
  ("train", "eval_every", 0, POSITIVE),
  ("train", "eval_batches", 0, POSITIVE),
  ("train", "checkpoint_every", 0, POSITIVE),
  ("train", "keep_checkpoints", 1, "at least 2"),
  ("train", "keep_every", -1, NOT_NEGATIVE),
  ("train", "keep_best", -1, NOT_NEGATIVE),
  ("train", "sample_every", 0, POSITIVE),
  ("train", "num_samples", 0, POSITIVE),
  ("train", "log_every", 0, POSITIVE),
  ("train", "histogram_every", -1, NOT_NEGATIVE),
  ("train", "replay_every", -1, NOT_NEGATIVE),
  ("train", "replay_tolerance", -0.1, NOT_NEGATIVE),
  ("train", "replay_tolerance", 1.0, BELOW_1),
  ("train", "peak_flops", -1.0, NOT_NEGATIVE),
  ("train", "max_skipped", -1, NOT_NEGATIVE),
  ("train", "metrics_port", -1, NOT_NEGATIVE),
  ("train", "metrics_port", 65_536, "at most 65535"),
  ("train", "minutes", -1.0, NOT_NEGATIVE),
  ("train", "hang_minutes", -1.0, NOT_NEGATIVE),
  ("reinforce", "tasks", (), "have at least 1 item"),
  ("reinforce", "samples", 1, "at least 2"),
  ("reinforce", "reward", "human", "'judge' or 'clip'"),
  ("reinforce", "temperature", 0.0, POSITIVE),
  ("reinforce", "kl_weight", -0.1, NOT_NEGATIVE),
  ("reinforce", "heldout_prompts", 1, "at least 2"),
  ("sampling", "method", "beam", "'top_p', 'contrastive' or 'mixture'"),
  ("sampling", "temperature", 0.0, POSITIVE),
  ("sampling", "top_k", -1, NOT_NEGATIVE),
  ("sampling", "top_p", 0.0, POSITIVE),
  ("sampling", "top_p", 1.1, AT_MOST_1),
  ("sampling", "guidance", -0.1, NOT_NEGATIVE),
  ("sampling", "image_guidance", -0.1, NOT_NEGATIVE),
  ("sampling", "edit_guidance", -0.1, NOT_NEGATIVE),
  ("sampling", "guidance_schedule", "step", "'constant', 'linear' or 'cosine'"),
  ("sampling", "contrastive_k", 0, POSITIVE),
  ("sampling", "contrastive_alpha", -0.1, NOT_NEGATIVE),
  ("sampling", "contrastive_alpha", 1.1, AT_MOST_1),
  ("sampling", "contrastive_temperature", 0.0, POSITIVE),
  ("sampling", "amateur_temperature", 0.0, POSITIVE),
  ("sampling", "text_temperature", 0.0, POSITIVE),
  ("sampling", "text_top_k", -1, NOT_NEGATIVE),
  ("sampling", "text_top_p", 0.0, POSITIVE),
  ("sampling", "text_top_p", 1.1, AT_MOST_1),
  ("evaluation", "num_documents", 1, "at least 2"),
  ("evaluation", "batch_size", 0, POSITIVE),
  ("evaluation", "num_resamples", 99, "at least 100"),
  ("evaluation", "scenes", -1, NOT_NEGATIVE),
  ("evaluation", "scene_guidance", (), "have at least 1 item"),
  ("evaluation", "scene_guidance", (1.0, -0.5), NOT_NEGATIVE),
  ("evaluation", "scene_neighbors", -1, NOT_NEGATIVE),
]
# Fields that every value of their type is right for.
FREE = {
  "raw.source",
  "raw.allow_outside",
  "raw.default_license",
  "raw.default_attribution",
  "vqgan.perceptual",
  "retrieval.clip",
  "instructions.tasks",
  "instructions.root",
  "instructions.allow_outside",
  "model.query_key_norm",
  "model.tied_start",
  "model.unroll_layers",
  "optimizer.decay_embeddings",
  "train.tensorboard",
  "train.wandb",
}


@pytest.mark.parametrize(("section", "field", "value", "bound"), REFUSED)
def test_a_value_out_of_range_is_refused_in_one_sentence(section, field, value, bound):
  with pytest.raises(UserError) as error:
    settings_with(**{f"{section}__{field}": value})
  message = str(error.value)
  assert message.startswith(f"config.{section}.{field}")
  assert message.endswith(".")
  assert f"; it must {'' if bound.startswith('have') else 'be '}{bound}" in message
  with pytest.raises(ValueError, match=field):
    dataclasses.replace(SECTIONS[section](), **{field: value})


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
VALUES |= st.lists(VALUES, max_size=3) | st.dictionaries(st.text(max_size=3), VALUES, max_size=2)
FIELDS = [(section, field) for section, field, *_ in REFUSED]
FIELDS += [tuple(name.split(".")) for name in sorted(FREE)]


@given(st.sampled_from(FIELDS), VALUES)
@hypothesis_settings(max_examples=300)
def test_any_value_of_any_field_makes_settings_or_one_sentence(place, value):
  try:
    found = settings_with(**{"__".join(place): value})
  except UserError as error:
    found = str(error)
    assert found.isprintable()
  assert isinstance(found, Settings) or found.startswith("config")


INTEGERS = [(section, field) for section, field, value, _ in REFUSED if type(value) is int]


@pytest.mark.parametrize(("section", "field"), sorted(set(INTEGERS)))
def test_the_largest_whole_number_takes_no_time(section, field):
  """2^70 as `vqgan.discriminator_layers` took for ever."""
  with refused(FieldError, path=(field,)):
    settings_with(**{f"{section}__{field}": 2**70})
  begin = time.process_time()
  with contextlib.suppress(UserError):
    settings_with(**{f"{section}__{field}": 2**31 - 1})
  assert time.process_time() - begin < 1


def test_every_field_is_in_the_table_above():
  fields = {f"{name}.{f.name}" for name, cls in SECTIONS.items() for f in dataclasses.fields(cls)}
  assert {f"{section}.{field}" for section, field, *_ in REFUSED} | FREE == fields


def test_sections_are_static_arguments_that_can_be_replaced_pickled_and_hashed():
  settings = settings_with(train__steps=3)
  assert pickle.loads(pickle.dumps(settings)) == settings == settings_with(train__steps=3)
  assert hash(settings) == hash(settings_with(train__steps=3)) != hash(settings_with())
  assert dataclasses.asdict(settings)["train"]["steps"] == 3
  longer = dataclasses.replace(settings, train=dataclasses.replace(settings.train, steps=5), seed=2)
  assert (longer.train.steps, longer.seed) == (5, 2)
  with pytest.raises(dataclasses.FrozenInstanceError):
    settings.train.steps = 4
  traces = []

  def width(model):
    traces.append(model)
    return model.width

  width = jax.jit(width, static_argnums=0)
  assert width(settings.model) == width(settings_with().model) == 4_096
  assert len(traces) == 1


def test_describe_lists_every_field_and_marks_what_is_not_the_default():
  lines = describe(settings_with(seed=7, train__steps=5, raw__licenses=["CC0-1.0"]))
  assert lines[0] == "seed = 7  # default: 0"
  assert "train.steps = 5  # default: 41723" in lines
  assert "raw.licenses = ('CC0-1.0',)  # default: ()" in lines
  assert "raw.source = ''" in lines
  assert len([line for line in lines if "#" in line]) == 3
  assert len(lines) == 1 + sum(len(dataclasses.fields(cls)) for cls in SECTIONS.values())


def test_the_page_of_all_fields_is_current():
  path = pathlib.Path(__file__).parents[1] / "docs" / "config.md"
  assert path.read_text(encoding="utf-8") == config_reference.page(), (
    "docs/config.md is old: python -m cm3leon_jax.reports.config_reference"
  )


@pytest.mark.parametrize(
  "row",
  [
    "| `steps` | int, > 0 | `41723` | Number of training steps. |",
    '| `family` | `"opt"`, `"modern"` | `"opt"` | Architecture. ',
    "| `heldout_fraction` | float, >= 0, < 1 | `0.05` | ",
    "| `multipliers` | tuple of int, > 0 | `(1, 2, 4)` | ",
    "| `top_p` | float, > 0, <= 1 | `0.9` | ",
    '| `wandb` | str | `""` | ',
    "| `own_tasks` | tuple of dict | `()` | Additional tasks",
    "| `image_width` | int, > 0, a multiple of 64 | `768` | ",
  ],
)
def test_rows_of_the_page_state_type_range_and_default(row):
  assert f"\n{row}" in config_reference.page()
