"""Reads the records of tasks and encodes them into one store per task and split."""

from collections.abc import Callable, Iterator
import dataclasses
import hashlib
import itertools
import json
import posixpath

from etils import epath

from cm3leon_jax.config.instructions import InstructionsConfig, InstructionTask, is_edit
from cm3leon_jax.data.documents.encode import load_tokenizers
from cm3leon_jax.data.documents.shard_files import shards_with_files
from cm3leon_jax.data.documents.store import INDEX
from cm3leon_jax.data.instructions import files
from cm3leon_jax.data.instructions.edges import MAPS, ImageMap, load_opencv
from cm3leon_jax.data.instructions.records import Record
from cm3leon_jax.data.instructions.stores import RecordEncoder, write_store
from cm3leon_jax.data.sources.image_folder import ImageFolder
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import check_foreign, plain, read_json
from cm3leon_jax.stages.shards import Runner, run_shards
from cm3leon_jax.vocab import VocabLayout

SPLITS = ("train", "heldout")
REMEDY = (
  "put it there, or name the folder of the images in the task's `images`; "
  "config.instructions.allow_outside=True allows images from everywhere."
)
# Which folders the fields of a task may name. A task file may come from an untrusted source.
BELOW = (
  "name a path below config.instructions.root, by default the folder of the task file; "
  "config.instructions.allow_outside=True allows others."
)
# Task fields that change only the mixture and the samples, not the stores.
NOT_OF_STORES = ("weight", "cap", "loss_weight", "drop_instruction", "drop_all")


def store_name(split: str, task: InstructionTask) -> str:
  """Returns the name of a task's store, e.g. "train_vqa"."""
  return f"{split}_{task.name}"


def open_task(
  task: InstructionTask,
  split: str,
  config: InstructionsConfig,
) -> Iterator[Record]:
  """Yields the records of a task.

  `split` is "train" or "heldout".

  Raises:
    UserError: the format or split is unknown, a field names a place outside of the folder, a map is
      not possible for the records, or `open_records` raises an error. The message names the task.
  """
  name, number = task.train, min(filter(None, (task.records, config.max_records)), default=0)
  if split == "heldout":
    name, number = task.heldout, task.heldout_records
  try:
    _check_maps(task, config)
    root = _path(config, "root", task.root)
    if task.format == "jsonl":  # The name of a split is that of its file.
      check_foreign(_path(config, split, posixpath.join(task.root, f"{name}.jsonl")))
    images = ImageFolder(
      _path(config, "images", task.images or task.root), REMEDY, config.allow_outside
    )
    result = files.open_records(task.format, root, name, images)
    for record in itertools.islice(result, number or None):
      yield _with_maps(task, record, config)
  except UserError as error:
    raise UserError(f"task {task.name}: {error}") from error


def _path(config: InstructionsConfig, field: str, name: str) -> str:
  """Returns the path of `name`, the value of a task's field.

  Raises:
    UserError: the path is a URL, or outside of the folder of all tasks.
  """
  if posixpath.normpath(name) == ".":
    return config.folder
  return ImageFolder(config.folder, BELOW, config.allow_outside).find(name, f"its {field}", "path")


def _check_maps(task: InstructionTask, config: InstructionsConfig) -> None:
  """Raises UserError if OpenCV is missing for computed maps, or the folder of a map is missing."""
  if set(task.maps.values()) & set(MAPS):
    load_opencv()
  for field, kind in task.maps.items():
    if kind not in MAPS and not (folder := epath.Path(_path(config, "maps", kind))).is_dir():
      raise UserError(
        f"its map '{field}' is '{kind}'; it must be one of {', '.join(MAPS)}, or a folder, but "
        f"{folder} does not exist."
      )


def _with_maps(task: InstructionTask, record: Record, config: InstructionsConfig) -> Record:
  """Adds maps to a record. A map is computed from the target, or is a file in a folder."""
  if not task.maps:
    return record
  if task.target not in record.images:
    raise UserError(f"`maps` requires an image as the target, but the target is {task.target}.")
  image = record.images[task.target]
  images = dict(record.images)
  for field, kind in task.maps.items():
    if field in (*record.texts, *record.images):
      raise UserError(
        f"its map '{field}' has the same name as a field of record {record.key}: rename it."
      )
    if kind in MAPS:
      images[field] = ImageMap(kind, image)
    elif isinstance(image, str):
      name = posixpath.basename(image)
      folder = ImageFolder(_path(config, "maps", kind), REMEDY, config.allow_outside)
      images[field] = folder.find(name, f"record {record.key}")
    else:
      raise UserError(
        f"its map '{field}' is the folder '{kind}', but its images are not files: use one of "
        f"{', '.join(MAPS)}."
      )
  return dataclasses.replace(record, images=images)


@dataclasses.dataclass(frozen=True)
class InstructionJob:
  """Encodes the records of all tasks. Each shard of the job is one store, see `store_name`.

  Attributes:
    workdir: folder with the tokenizers. The stores go to its subfolder instructions/.
    positions: maximum number of predicted tokens per sample, which is the length of a row.
  """

  workdir: str
  tasks: tuple[InstructionTask, ...]
  config: InstructionsConfig
  vocab: VocabLayout
  positions: int
  num_threads: int

  def open(self) -> Callable[[str], dict]:
    """Loads the tokenizers. Returns a function that encodes one store, see `shards.ShardJob`."""
    text_tokenizer, image_tokenizer = load_tokenizers(self.workdir, self.vocab)
    encoder = RecordEncoder(
      text_tokenizer.encode,
      image_tokenizer,
      self.vocab,
      self.positions,
      self.num_threads,
      instruction_first=self.config.instruction_first,
    )
    training = dataclasses.replace(encoder, redrawn=self.config.redrawn)
    folder = epath.Path(self.workdir) / "instructions"

    def encode(name: str) -> dict:
      split, _, task_name = name.partition("_")
      [task] = [task for task in self.tasks if task.name == task_name]
      records = open_task(task, split, self.config)
      return write_store(folder / name, task, records, training if split == "train" else encoder)

    return encode


def encode_tasks(job: InstructionJob, inputs: dict, runner: Runner) -> dict[str, dict]:
  """Writes the missing stores, one per task and split.

  `inputs` contains the ids of the tokenizers. If one of these ids changes, all stores are encoded
  again.
  Returns a dict from store name to counts, see `write_store`.
  """
  configs = {
    store_name(split, task): {**identity(task, job), "inputs": inputs}
    for task in job.tasks
    for split in SPLITS
    if split == "train" or task.heldout
  }
  folder = epath.Path(job.workdir) / "instructions"
  folder.mkdir(parents=True, exist_ok=True)

  def is_whole(name: str) -> bool:
    store = folder / name
    shards = (
      read_json(store / INDEX, {"shards": dict})["shards"] if (store / INDEX).exists() else {}
    )
    return bool(shards) and all(map(shards_with_files([store]), shards))

  return dict(run_shards(job, configs, folder / "done", runner, "tasks", is_whole))


def identity(task: InstructionTask, job: InstructionJob) -> dict:
  """Returns all values on which the stores of a task depend, except the tokenizers."""
  fields = dataclasses.asdict(task)
  for name in NOT_OF_STORES:
    del fields[name]
  of_config = {"root": job.config.folder, **_counts(job.config)}
  if job.config.instruction_first and any(map(is_edit, task.templates)):
    # Absent otherwise, so stores from before keep their identity.
    of_config["instruction_first"] = True
  return {"task": fields, **of_config, "positions": job.positions}


def _counts(config: InstructionsConfig) -> dict:
  """Returns the fields on which all stores depend, except the folder of the files."""
  return {"max_records": config.max_records, "redrawn": config.redrawn}


def digest_of(tasks: tuple[InstructionTask, ...], config: InstructionsConfig) -> str:
  """Returns the SHA-256 digest of everything but the folder on which the stores depend."""
  common = {**_counts(config), "instruction_first": config.instruction_first}
  values = [common, *(plain(dataclasses.asdict(task)) for task in tasks)]
  return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
