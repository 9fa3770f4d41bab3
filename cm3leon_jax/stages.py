"""Stages of a run: each owns a folder of the workdir and leaves `done.json` in it."""

from collections.abc import Callable, Collection, Mapping
import contextlib
import dataclasses
import time

from etils import epath

from cm3leon_jax.config import UserError
from cm3leon_jax.io import plain, read_json, write_json

DONE = "done.json"


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage: a row of `STAGES`.

  Attributes:
    command: name of the command that runs the stage.
    title: name in the report.
    reads: stages whose results it reads; when one of them ran again, so does this stage.
    same: parts of the config that make two runs the same run: "seed", a section or
      `section.field`.
    embeds: whether it embeds with CLIP, and so reads the stages of `own_clip`, too.
  """

  command: str
  title: str
  reads: tuple[str, ...]
  same: tuple[str, ...]
  embeds: bool = False


TOKENIZERS = ("text_tokenizer", "vqgan")
RUN = ("vocab", "data", "model", "optimizer", "train.global_batch_size", "seed")

# Folder of the workdir -> stage, in the order in which they run.
STAGES = {
  "raw": Stage("prepare_data", "Raw pairs and texts", (), ("raw", "scenes")),
  "text_tokenizer": Stage(
    "train_text_tokenizer", "Text tokenizer", ("raw",), ("vocab", "text_tokenizer")
  ),
  "vqgan": Stage("train_vqgan", "Image tokenizer", ("raw",), ("vqgan", "vocab.image_size", "seed")),
  "documents": Stage(
    "encode_documents",
    "Documents",
    ("raw", *TOKENIZERS),
    ("vocab", "text_tokenizer.max_caption_tokens"),
  ),
  "clip": Stage("train_clip", "CLIP", ("raw", "text_tokenizer"), ("clip", "vocab", "seed")),
  "neighbors": Stage("build_neighbors", "Neighbors", ("raw",), ("retrieval", "seed"), embeds=True),
  "instructions": Stage(
    "encode_instructions",
    "Instructions",
    TOKENIZERS,
    ("vocab", "instructions.root", "data.sequence_length"),
  ),
  "train": Stage("train", "Decoder", ("documents", "neighbors"), RUN),
  "samples": Stage(
    "generate",
    "Samples",
    (*TOKENIZERS, "documents", "neighbors", "train"),
    ("retrieval",),
    embeds=True,
  ),
  "evaluation": Stage(
    "evaluate", "Evaluation", ("documents", "neighbors", "train"), ("evaluation", "data", "seed")
  ),
  "grades": Stage(
    "grade_instructions",
    "Grades of instructions",
    ("instructions", "train"),
    ("sampling", "evaluation", "seed"),
  ),
  "export": Stage("export", "Export", ("text_tokenizer", "train"), ("model",)),
}

# Fields that do not count where `same` names their whole section: how, how fast or how long a
# stage computes, and what only another stage reads.
FREE = frozenset(
  {
    "raw.num_threads",
    "raw.max_rejected",
    "scenes.train",  # Other numbers of scenes make more or fewer parts, which the stage reads.
    "scenes.heldout",
    "text_tokenizer.max_caption_tokens",
    "vqgan.steps",
    "vqgan.checkpoint_every",
    "clip.steps",
    "clip.checkpoint_every",
    "data.read_threads",
    "model.remat_policy",
    "model.attention",
    "model.unroll_layers",
    "model.loss_chunk",
  }
)


def differences(old: dict, new: dict, where: str = "") -> list[str]:
  """Returns `name: old -> new` for every leaf that differs between two nested dicts."""
  changed = []
  for key in sorted({*old, *new}):
    a, b = old.get(key), new.get(key)
    if isinstance(a, dict) and isinstance(b, dict):
      changed += differences(a, b, f"{where}{key}.")
    elif a != b:
      changed.append(f"{where}{key}: {a} -> {b}")
  return changed


def check_same_config(path: epath.PathLike, stored: dict, config: dict) -> None:
  """Raises UserError, with the fields, if the run in `path` has another config."""
  changed = differences(stored, plain(config))
  if changed:
    raise UserError(
      f"{path} holds the run of another config ({'; '.join(changed[:4])}): "
      "use another --workdir, or delete that folder to start again."
    )


def identity(settings, name: str) -> dict:
  """Returns the parts of the config that make two runs of a stage the same run.

  identity(settings, "documents")
  {"vocab": {"num_special": 256, ...}, "text_tokenizer": {"max_caption_tokens": 512}}
  """
  config: dict = {}
  for part in STAGES[name].same:
    section, _, field = part.partition(".")
    value = getattr(settings, section)
    if field:
      config.setdefault(section, {})[field] = getattr(value, field)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
      fields = dataclasses.asdict(value).items()
      config[section] = {k: v for k, v in fields if f"{section}.{k}" not in FREE}
    else:
      config[section] = value
  if name == "train" and settings.instructions.any:
    config["instructions"] = dataclasses.asdict(settings.instructions)
  return config


def require(workdir: epath.PathLike, name: str, **fields: type) -> dict:
  """Returns the content of a stage's done.json, with its id and `fields` of these types.

  Raises:
    UserError: the stage is not finished, or the file is damaged.
  """
  folder = epath.Path(workdir) / name
  if not (folder / DONE).exists():
    raise UserError(
      f"{folder} is not finished: run `python -m launch.{STAGES[name].command}` "
      "with the same --config and --workdir first."
    )
  return read_json(folder / DONE, {"id": str, **fields})


def own_clip(settings) -> tuple[str, ...]:
  """Returns the stages of the run's own CLIP; none if the config names a published CLIP."""
  return () if settings.retrieval.clip else ("text_tokenizer", "clip")


def ids(settings, workdir: epath.PathLike, names: Collection[str]) -> dict[str, str]:
  """Returns the ids of finished stages.

  Raises:
    UserError: a stage is not finished, or the config has another model than the training.
  """
  result = {name: require(workdir, name)["id"] for name in names}
  if "train" in result:
    folder, expected = epath.Path(workdir) / "train", identity(settings, "train")
    stored = read_json(folder / "config.json", {"run": dict})["run"]
    parts = ("vocab", "model")
    check_same_config(folder, {p: stored.get(p) for p in parts}, {p: expected[p] for p in parts})
  return result


def inputs(settings, workdir: epath.PathLike, name: str) -> dict[str, str]:
  """Returns the ids of all stages that a stage reads. Raises UserError, see `ids`."""
  own = own_clip(settings) if STAGES[name].embeds else ()
  reads = STAGES[name].reads
  if name == "train" and settings.instructions.any:
    reads = ("instructions", *(reads if settings.instructions.replay_share else ()))
  return ids(settings, workdir, (*reads, *own))


def run_config(
  settings, workdir: epath.PathLike, name: str, more_inputs: Mapping[str, str] | None = None
) -> dict:
  """Returns what the result of a stage depends on.

  This is its part of the config, and under "inputs" the ids of what it reads.
  """
  read = {**inputs(settings, workdir, name), **(more_inputs or {})}
  return {**identity(settings, name), "inputs": read}


def stage(
  workdir: epath.PathLike,
  name: str,
  settings,
  more_inputs: Mapping[str, str] | None = None,
  **options,
):
  """Runs the body once for the stage `name` of `STAGES`, see `once`.

    with stages.stage(workdir, "vqgan", settings) as summary:
      if summary is not None:
        summary.update(psnr_db=23.3)  # The seconds are added.

  Args:
    workdir: the run's folder.
    name: the stage.
    settings: the run's config.
    more_inputs: digests of what the stage reads beside other stages.
    **options: of `once`.

  Raises:
    UserError: a stage that it reads is not finished, or its folder holds the result of another
      config.
  """
  config = run_config(settings, workdir, name, more_inputs)
  return once(epath.Path(workdir) / name, config, **options)


@contextlib.contextmanager
def once(
  folder: epath.PathLike,
  config: dict,
  redo: bool = False,
  writes: bool = True,
  together: Callable = contextlib.nullcontext,
):
  """Runs the body once: yields None if the folder is finished, else a dict for its summary.

  Args:
    folder: the stage's folder; made if absent.
    config: what the result depends on: config sections, and under "inputs" the ids of the stages
      that it reads. If the inputs have changed, the body runs again; another config is refused.
    redo: whether to run again if the stage is finished.
    writes: whether this process deletes and writes done.json; one process of a job does. Either all
      processes run the body, or none.
    together: makes the context in which the processes of a job read done.json, so that all have
      read it before one deletes it.

  Raises:
    UserError: the folder holds the result of another config.
  """
  folder = epath.Path(folder)
  done = folder / DONE
  with together():
    finished = done.exists() and _is_current(folder, config) and not redo
  if finished:
    if writes:
      print(f"{folder}: finished already, skipped.", flush=True)
    yield None
    return
  if writes:
    done.unlink(missing_ok=True)  # Until the end the folder holds no complete result.
    folder.mkdir(parents=True, exist_ok=True)
  start = time.time()
  summary: dict = {}
  yield summary
  if writes:
    seconds, new_id = round(time.time() - start, 1), f"{time.time_ns():x}"
    write_json(done, {"config": config, "summary": summary, "seconds": seconds, "id": new_id})


def _is_current(folder: epath.Path, config: dict) -> bool:
  """Returns whether a finished stage read the inputs of `config`.

  Raises:
    UserError: another part of its config differs.
  """
  stored = read_json(folder / DONE, {"config": dict})["config"]
  inputs = plain(config).get("inputs")
  check_same_config(folder, {**stored, "inputs": inputs}, {**config, "inputs": inputs})
  return stored.get("inputs") == inputs
