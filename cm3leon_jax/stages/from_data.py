"""Computes the config fields that are None until the data is prepared.

`cm3leon prepare_data` counts the data and stores the counts in raw/done.json. Every later stage
computes the fields from these counts, so all stages of a run see the same values.

If such a config starts from another run, its base, the model and the tokenizers have the fields of
the base. `cm3leon copy_tokenizers` stores these fields in text_tokenizer/done.json.
"""

from collections.abc import Collection
import dataclasses
import math
from typing import Any

from etils import epath
import ml_collections

from cm3leon_jax.config import own_functions
from cm3leon_jax.config.build import build
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.stages import stages

COUNTS = "counts"  # Key in the summary of raw/done.json.
OF_PARENT = "base_fields"  # Key in the summary of text_tokenizer/done.json.
CHARACTERS = 4  # Characters per token, approximately.
# Largest text vocabulary. A decoder that trains for minutes cannot learn more tokens.
MOST_TEXT_TOKENS = 2_048
MOST_TEXT_SHARE = 0.15
FIXED_SECONDS = 200  # Seconds, on two cores, of everything in a run that is not a training step.
SECONDS_PER_PAIR = 0.02
# For each stage that trains: its share of the remaining time, and its seconds per step at
# `RESOLUTION` on two cores.
TRAININGS = {"vqgan": (0.12, 0.03), "clip": (0.04, 0.25), "train": (0.8, 0.18)}
RESOLUTION = 48
PATCH = 4  # Side length, in pixels, of the square that a code represents.
LONG = 1.5  # A row has space for captions of this many times the mean length.
LEAST_STEPS = {"vqgan": 300, "clip": 30, "train": 100}
MOST_STEPS = {"vqgan": 6_000, "clip": 400, "train": 20_000}
OTHERS = ("model.vocab_size",)  # Fields that are computed from other fields, not from the data.
# Sections and fields that a run has in common with its base.
FOLLOWED = {
  *("vocab", "model", "vqgan", "clip", "text_tokenizer", "data", "sampling"),
  *("optimizer.name", "retrieval.clip", "instructions.instruction_first"),
  *("train.global_batch_size", "train.gradient_accumulation_steps"),
}
# Fields of these sections that describe the documents, the machine or the training, not the model.
NOT_FOLLOWED = {
  *("data.text_share", "data.interleaved_share", "data.base_documents", "data.base_share"),
  *("data.read_threads", "data.on_bad_record", "data.max_skipped"),
  *("model.vocab_size", "vqgan.steps", "clip.steps"),
}
# Fields that decide the shapes of a model's parameters.
SHAPES = tuple(
  f"model.{name}"
  for name in ("family", "num_layers", "width", "num_heads", "num_kv_heads", "mlp_width")
)
BASE_DOCUMENTS, BASE_SHARE = 4_000, 0.1
# Share of the base's learning rate. With the whole rate, the bundled model learned no more of 240
# drawings and forgot three times as many images (docs/tuning.md).
BASE_RATE = 1 / 3
# Learning rate of adapters, relative to that of a full tuning. With it, adapters learned as much of
# 240 drawings, and forgot as much, as a full tuning (docs/tuning.md).
ADAPTER_RATE = 9
# Layers x (4 width^2 + 3 width x mlp_width) x tokens per step of the config `own`, whose step takes
# the seconds in `TRAININGS`.
OWN_COST = 4 * (4 * 128**2 + 3 * 128 * 352) * 2 * 512


@dataclasses.dataclass(frozen=True)
class Counts:
  """Counts of the prepared data. All but `heldout_texts` describe the training split.

  Attributes:
    resolution: side length of the prepared images, in pixels.
    pairs, texts, heldout_texts: numbers of records.
    caption_characters, text_characters: total lengths of all captions and of all texts.
    text_tokens: largest `vocab.text_size` that the captions and texts support.
  """

  resolution: int
  pairs: int
  texts: int
  heldout_texts: int
  caption_characters: int
  text_characters: int
  text_tokens: int


# Placeholder for commands that read none of the computed fields.
UNKNOWN = Counts(RESOLUTION, 1_000, 0, 0, 50_000, 0, MOST_TEXT_TOKENS)


def missing(config: ml_collections.ConfigDict) -> list[str]:
  """Returns the fields that are None and are computed from the data: ["vocab.text_size", ...]."""
  names = [
    f"{section}.{field}"
    for section, fields in config.items()
    if isinstance(fields, ml_collections.ConfigDict)
    for field, value in fields.items()
    if value is None
  ]
  return [name for name in names if name not in OTHERS]


def parent_fields(base: dict[str, Any], documents: bool) -> dict[str, Any]:
  """Returns the fields that a run has in common with its base: {"model.width": 192, ...}.

  `base` has the sections of the base's settings. `documents` is whether documents of the base are
  available for replay.
  """
  flat = {f"{name}.{k}": v for name in base if name != "seed" for k, v in base[name].items()}
  followed = {
    name: value
    for name, value in flat.items()
    if (name in FOLLOWED or name.partition(".")[0] in FOLLOWED) and name not in NOT_FOLLOWED
  }
  share = BASE_SHARE if documents else 0.0
  followed |= {"data.base_documents": BASE_DOCUMENTS * documents, "data.base_share": share}
  followed["optimizer.learning_rate"] = BASE_RATE * flat["optimizer.learning_rate"]
  return {**followed, "raw.resolution": flat["vqgan.resolution"]}


def row_fields(counts: Counts) -> dict[str, int]:
  """Returns the fields that decide how long a row is: two documents, one of them a neighbor."""
  codes = (counts.resolution // PATCH) ** 2
  caption = LONG * counts.caption_characters / max(1, counts.pairs) / CHARACTERS
  length = 32 * math.ceil(2 * (codes + 4 + caption) / 32)
  return {"data.sequence_length": length, "model.max_positions": length}


def _fitting(of_parent: dict[str, Any], counts: Counts) -> dict[str, Any]:
  """Returns the fields of a base, whose rows become longer if the data needs it.

  Only for a base with `vqgan.source`: its tokenizer fits every resolution.
  """
  if not of_parent.get("vqgan.source"):
    return of_parent
  rows = {name: max(of_parent[name], length) for name, length in row_fields(counts).items()}
  return {**of_parent, **rows, "vqgan.resolution": counts.resolution}


def _cost(fields: dict[str, Any]) -> float:
  """Estimates how many times longer a decoder step takes than the one that was measured."""
  layers, width, mlp = (fields[f"model.{name}"] for name in ("num_layers", "width", "mlp_width"))
  tokens = fields["train.global_batch_size"] * fields["data.sequence_length"]
  return layers * (4 * width**2 + 3 * width * mlp) * tokens / OWN_COST


def values(counts: Counts, minutes: float, cost: float = 1.0) -> dict[str, int | float]:
  """Computes all fields that can be computed from the data.

  values(Counts(48, 264, 0, 0, 7_360, 0, 358), 15.0)
  {"vocab.text_size": 358, "data.text_share": 0.0, "vqgan.resolution": 48, ...}

  `minutes` is `train.minutes`, the time that all stages of the run may take on two cores. `cost` is
  the result of `_cost`.
  """
  size = min(counts.text_tokens, MOST_TEXT_TOKENS)
  result: dict[str, int | float] = {"vocab.text_size": size, "data.text_share": _text_share(counts)}
  result |= {"vqgan.resolution": counts.resolution, "clip.resolution": counts.resolution}
  result |= row_fields(counts)
  pairs = max(1, counts.pairs)
  result |= {"vqgan.batch_size": min(16, pairs), "clip.batch_size": min(128, max(2, pairs))}
  seconds = max(0.0, 60 * minutes - FIXED_SECONDS - SECONDS_PER_PAIR * counts.pairs)
  for section, (share, step) in TRAININGS.items():
    scale = cost if section == "train" else (counts.resolution / RESOLUTION) ** 2
    steps = share * seconds / (step * scale)
    result[f"{section}.steps"] = max(LEAST_STEPS[section], min(MOST_STEPS[section], round(steps)))
  result |= {"data.base_documents": 0, "data.base_share": 0.0, "train.patience": 3}
  return result | {f"train.{k}": v for k, v in intervals(int(result["train.steps"])).items()}


def intervals(steps: int) -> dict[str, int]:
  """Returns every how many steps a training of `steps` steps saves, evaluates and samples."""
  every = {"eval_every": max(5, steps // 8), "sample_every": max(5, steps // 3)}
  return {"checkpoint_every": min(400, max(5, steps // 12)), **every}


def _text_share(counts: Counts) -> float:
  """Returns the share of text tokens in training, at most `MOST_TEXT_SHARE`; 0.0 without texts."""
  if not counts.texts or not counts.heldout_texts:
    return 0.0
  codes = (counts.resolution // PATCH) ** 2
  texts = counts.text_characters / CHARACTERS
  pairs = counts.pairs * codes + counts.caption_characters / CHARACTERS
  return min(MOST_TEXT_SHARE, round(texts / (texts + pairs), 2))


def complete(
  config: ml_collections.ConfigDict,
  workdir: epath.PathLike | None,
  prepares: bool = False,
  of_parent: dict[str, Any] | None = None,
  given: Collection[str] = (),
) -> ml_collections.ConfigDict:
  """Replaces the fields that are None by values that are computed from the data.

  If the run starts from a base, other fields are replaced by the base's values, too.

  Args:
    config: config of a run. Fields that are not None stay unchanged, except for `of_parent`.
    prepares: whether the command prepares the data. A command that prepares the data reads none of
      these fields, so it gets placeholder values until the data is prepared.
    of_parent: result of `parent_fields`; None: the values that are stored in `workdir`, if any.
    given: fields that the user has set, such as "train.steps". They stay unchanged.

  Raises:
    UserError: the data is not prepared or was prepared with another config, a field is None that is
      not computed from the data, or the base has a model of another size than `given`.
  """
  if not (names := missing(config)):
    return config
  of_parent = stored_of_parent(workdir) if of_parent is None else of_parent
  _check_shapes(config, of_parent, given)
  tuned = config.instructions.tasks or config.instructions.own_tasks
  counted = not (of_parent and tuned)  # A run that tunes on instructions alone counts no pairs.
  counts = _counts(workdir, names, prepares) if counted else UNKNOWN
  of_raw = {} if "raw.resolution" in given else of_parent
  if side := of_raw.get("raw.resolution", config.raw.resolution):
    if counts is UNKNOWN:
      counts = dataclasses.replace(counts, resolution=side)
    stored, asked = ({"raw": {"resolution": number}} for number in (counts.resolution, side))
    stages.check_same_config(epath.Path(workdir or ".") / "raw", stored, asked)
  known = values(counts, 0.0)
  if wrong := [name for name in names if name not in known]:
    raise UserError(
      f"config.{wrong[0]} is None; only {', '.join(known)} are computed from the data."
    )
  of_parent = _fitting(of_parent, counts) if counted else of_parent
  parts = [(f"{s}.{k}", v) for s in ("model", "data", "train") for k, v in config[s].items()]
  fields = {**row_fields(counts), **{k: v for k, v in parts if v is not None}, **of_parent}
  found = values(counts, config.train.minutes, _cost(fields))
  found["model.max_positions"] = fields["data.sequence_length"]
  if tuned:  # The loss of documents does not show how well a model answers.
    found["train.patience"] = 0
  if steps := config.train.steps:  # The user has set them.
    found |= {f"train.{name}": every for name, every in intervals(steps).items()}
  made = ml_collections.ConfigDict(config.to_dict())
  # The config may set these two fields.
  kept = {*given, *({"data.base_documents", "data.base_share"} - {*names})}
  new = {**{name: found[name] for name in names}, **of_parent}
  if of_parent and config.adapter.rank:
    new["optimizer.learning_rate"] *= ADAPTER_RATE
  made.update_from_flattened_dict({k: v for k, v in new.items() if k not in kept})
  for section, field in own_functions.FIELDS:  # A base is foreign; it names no file to import.
    made[section][field] = config[section][field]
  _check_side(made, side)
  return made


def _check_shapes(
  config: ml_collections.ConfigDict, of_parent: dict[str, Any], given: Collection[str]
) -> None:
  """Raises UserError if the user has set the size of a model to another one than the base's."""
  for name in (name for name in SHAPES if name in given and name in of_parent):
    value = config.model[name.removeprefix("model.")]
    if value != of_parent[name]:
      raise UserError(
        f"config.{name} is {value}, but the run starts from a base (--init_from or "
        f"config.train.base = '{config.train.base}'), which decides the model and has "
        f"{of_parent[name]}: leave it out, or give --init_from=none for a model of your own."
      )


def _check_side(config: ml_collections.ConfigDict, side: int) -> None:
  """Raises UserError if the image tokenizer cannot divide a resolution, `raw.resolution`."""
  square = config.vqgan.downsample
  if side and side == config.vqgan.resolution and square > 0 and side % square:
    raise UserError(
      f"config.raw.resolution is {side}; it must be a multiple of config.vqgan.downsample = "
      f"{square}, such as {max(1, side // square) * square}."
    )


def stored_of_parent(workdir: epath.PathLike | None) -> dict[str, Any]:
  """Returns the fields of the base that `cm3leon copy_tokenizers` stored in a workdir, or {}."""
  path = epath.Path(workdir or ".") / "text_tokenizer" / "done.json"
  if workdir is None or not path.exists():
    return {}
  stored = read_json(path, {"summary": dict})["summary"].get(OF_PARENT, {})
  return {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}


def _counts(workdir: epath.PathLike | None, names: list[str], prepares: bool) -> Counts:
  """Reads the counts of the prepared data. Raises UserError in the same cases as `complete`."""
  path = epath.Path(workdir or ".") / "raw" / "done.json"
  if workdir is not None and path.exists():
    summary = read_json(path, {"summary": dict})["summary"]
    if COUNTS in summary:
      return build(Counts, summary[COUNTS], COUNTS)
    raise UserError(
      f"{path} has no counts, which config.{names[0]} is computed from: the data was prepared with "
      "another --config. Use another --workdir, or delete that folder and prepare the data again."
    )
  if prepares:
    return UNKNOWN
  raise UserError(
    f"config.{names[0]} is computed from the data: run `cm3leon prepare_data` with the same "
    "--config and --workdir first."
  )
