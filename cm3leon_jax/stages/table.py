"""Lists the stages of a run, with their commands and dependencies. Reads no files."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from cm3leon_jax.config.settings import Settings


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage of a run.

  Attributes:
    reads: stages whose results this stage reads. If one of them runs again, this stage must also
      run again.
    same: parts of the config that two runs must share to count as the same run: "seed", a section,
      or `section.field`.
    embeds: whether the stage embeds with CLIP. If so, it also reads the stages of `own_clip`.
    files: glob patterns of the files in its folder that other stages open. done.json describes
      these files. Shards and arrays are many files, so their index.json has the digests.
    varying: glob patterns of files whose content differs each time they are written, even from the
      same inputs. done.json also describes them, but they do not change the id.
    instead: for a stage that can only run on one host, what to use in its place on several hosts.
  """

  command: str
  title: str
  reads: tuple[str, ...]
  same: tuple[str, ...]
  embeds: bool = False
  files: tuple[str, ...] = ()
  varying: tuple[str, ...] = ()
  instead: str = ""


MODEL_FILES = ("params.safetensors", "config.json")
STORE_FILES = ("*/*.npy", "*/index.json")
TOKENIZERS = ("text_tokenizer", "vqgan")
RUN = ("vocab", "data", "model", "optimizer", "train.global_batch_size", "seed")

# Folder of the workdir -> stage, in the order in which they run.
STAGES = {
  "raw": Stage("prepare_data", "Raw pairs and texts", (), ("raw",), files=("index.json",)),
  "text_tokenizer": Stage(
    "train_text_tokenizer",
    "Text tokenizer",
    ("raw",),
    ("vocab", "text_tokenizer"),
    files=("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
  ),
  "vqgan": Stage(
    "train_vqgan",
    "Image tokenizer",
    ("raw",),
    ("vqgan", "vocab.image_size", "seed"),
    files=MODEL_FILES,
    instead="a published image tokenizer, by `cm3leon import_vqgan --source=FOLDER` "
    "(docs/weights.md)",
  ),
  "documents": Stage(
    "encode_documents",
    "Documents",
    ("raw", *TOKENIZERS),
    ("vocab", "text_tokenizer.max_caption_tokens"),
    files=STORE_FILES,
  ),
  "clip": Stage(
    "train_clip",
    "CLIP",
    ("raw", "text_tokenizer"),
    ("clip", "vocab", "seed"),
    files=MODEL_FILES,
    instead="a published CLIP, by --config.retrieval.clip=FOLDER (docs/pods.md)",
  ),
  "neighbors": Stage(
    "build_neighbors",
    "Neighbors",
    ("raw",),
    ("retrieval", "seed"),
    embeds=True,
    files=("words.json", "*/rows.json", "*/*/index.json"),
    varying=("index/*/*",),
  ),
  "instructions": Stage(
    "encode_instructions",
    "Instructions",
    TOKENIZERS,
    ("vocab", "instructions.root", "data.sequence_length"),
    files=STORE_FILES,
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
  "forgetting": Stage(
    "measure_forgetting", "Forgetting of the base", ("train",), ("evaluation", "sampling", "seed")
  ),
  "export": Stage("export", "Export", (*TOKENIZERS, "train"), ("model",)),
}

# Fields that may differ between two runs although `same` names their section. They affect only how
# the stage computes or how long it trains, or only other stages read them.
FREE = frozenset(
  {
    "raw.num_threads",
    "raw.options",  # The parts of the source, an input of `raw`, depend on them.
    "raw.max_rejected",
    "text_tokenizer.max_caption_tokens",
    "vqgan.steps",
    "vqgan.checkpoint_every",
    "clip.steps",
    "clip.checkpoint_every",
    "evaluation.judge",  # The content of its file is an input of `evaluation`.
    "instructions.allow_outside",
    "data.read_threads",
    "data.on_bad_record",
    "data.max_skipped",
    "model.remat_policy",
    "model.attention",
    "model.unroll_layers",
    "model.loss_chunk",
  }
)


def identity(settings: Settings, name: str) -> dict:
  """Returns the parts of the config that two runs of a stage must share to count as the same run.

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
    fields = dataclasses.asdict(settings.instructions).items()
    config["instructions"] = {k: v for k, v in fields if f"instructions.{k}" not in FREE}
  if name == "train" and settings.adapter.rank:
    config["adapter"] = dataclasses.asdict(settings.adapter)
  if name == "train" and settings.train.only:
    config["train"]["only"] = settings.train.only
  return config


def unused(section: str, fields: Mapping[str, Any]) -> set[str]:
  """Returns the fields of a section that have no effect because of another field's value."""
  if section == "vqgan" and fields.get("source"):
    return {*fields} - {"source", "resolution", "downsample", "batch_size"}
  if section == "vocab" and fields.get("template", "cm3leon") == "cm3leon":
    return {"template"}  # Runs that are older than the field have no other.
  if section == "optimizer" and fields.get("schedule") != "wsd":
    return {"decay_fraction"}
  if section == "data" and fields.get("image_loss_weight", 1) == 1:
    return {"image_loss_weight"}
  return {"tied_start"} if section == "model" and fields.get("family") == "opt" else set()


def own_clip(settings: Settings) -> tuple[str, ...]:
  """Returns the stages that train the run's CLIP; none if the config names a published CLIP."""
  return () if settings.retrieval.clip else ("text_tokenizer", "clip")


def reads_of(settings: Settings, name: str) -> tuple[str, ...]:
  """Returns the stages whose results a stage reads with this config."""
  reads = STAGES[name].reads
  if name == "train" and settings.instructions.any:
    reads = ("instructions", *(reads if settings.instructions.replay_share else ()))
  return (*reads, *(own_clip(settings) if STAGES[name].embeds else ()))


def copies_images(settings: Settings, own_images: bool = False) -> bool:
  """Returns whether a run that starts from another run copies its image tokenizer.

  If not, the run has the stage `vqgan`. It trains a tokenizer (`own_images`) or, if the config has
  `vqgan.source`, only the decoder of the other run's tokenizer, if its images need that.
  """
  return not own_images and (settings.instructions.any or not settings.vqgan.source)


def order(settings: Settings, given: bool, own_images: bool = False) -> list[str]:
  """Returns the stages of a whole run with this config, in the order in which they run.

  With `given`, tokenizers and CLIP are copied from another run, so that no stage trains them, but
  for the image tokenizer, see `copies_images`.
  """
  ends = ["train"] if settings.instructions.any else ["samples", "evaluation", "export"]
  if settings.data.base_documents:
    ends.append("forgetting")
  copied = ["text_tokenizer", "clip"] if given else []
  copied += ["vqgan"] if given and copies_images(settings, own_images) else []
  needed: set[str] = set()
  waiting = ends
  while waiting:
    name = waiting.pop()
    if name not in needed and name not in copied:
      needed.add(name)
      waiting += reads_of(settings, name)
  return [name for name in STAGES if name in needed]
