"""Imports a checkpoint into a workdir: its tokenizer, and its parameters as the start of a run."""

import collections
from collections.abc import Collection, Mapping
import dataclasses
import functools
from typing import Any

from etils import epath

from cm3leon_jax.config.model import FAMILIES, ModelConfig
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.data.documents import training_data
from cm3leon_jax.errors import UserError
from cm3leon_jax.files import foreign
from cm3leon_jax.files.digests import digest
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.importing import chameleon, chameleon_ids, images, qwen3, tokenizer
from cm3leon_jax.importing.chameleon import Published
from cm3leon_jax.importing.qwen3 import Tables
from cm3leon_jax.importing.source import CHAMELEON, CONFIG, SourceCheckpoint, open_source
from cm3leon_jax.run import initial
from cm3leon_jax.run.source import INIT, SETTINGS
from cm3leon_jax.stages import stages, table
from cm3leon_jax.tokenizers import text
from cm3leon_jax.weights import layouts, tensor_files
from cm3leon_jax.weights.tensor_files import Tensor

TEXT = "text_tokenizer"
NOTE = (
  "tables: all rows stay, in another order. Whether the head can draw cannot be read from the "
  "weights: Anole's was trained for it, and Meta's own release is not meant to draw."
)


@dataclasses.dataclass(frozen=True)
class Import:
  """Data to import.

  Attributes:
    fields: values that sections of the config must have.
    ids: the source's id of a text token -> our id; {} for a model of this project.
    notes: sentences about the vocabulary.
    published: other parts of a Chameleon.
  """

  source: SourceCheckpoint
  fields: dict[str, dict[str, Any]]
  tensors: list[Tensor]
  ids: Mapping[int, int]
  notes: list[str]
  published: Published | None = None


def plan(settings: Settings, source: str) -> Import:
  """Reads what an import would write, and compares it with the config. Writes nothing.

  `source` is the folder of the checkpoint.

  Raises:
    UserError: the checkpoint cannot be imported exactly, or the config has another model or
      vocabulary.
  """
  opened, vocab = open_source(source), settings.vocab
  if opened.is_own:
    fields = _own_fields(opened)
    _check_fields(settings, opened, fields)
    return Import(opened, fields, _own_tensors(opened, settings.model), {}, _own_notes(opened))
  rows = opened.size("vocab_size", 0)
  if opened.described["model_type"] == CHAMELEON:
    return _plan_chameleon(settings, opened, rows)
  tables, model = Tables(vocab, rows, _end_of_text(opened, rows)), qwen3.model_fields(opened)
  text_size = vocab.num_special + rows
  needed = {"model": model | {"vocab_size": text_size + vocab.image_size}}
  needed["vocab"] = {"text_size": text_size}
  _check_fields(settings, opened, needed)
  ids = {i: vocab.num_special + i for i in range(rows)}
  found = qwen3.tensors(opened, model, tables)
  return Import(opened, needed, found, ids, [tables.describe()])


@foreign.reads("a Chameleon in the layout of transformers", 1)
def _plan_chameleon(settings: Settings, source: SourceCheckpoint, rows: int) -> Import:
  """Plans the import of a Chameleon. See `plan`."""
  model, path, vocab = chameleon.model_fields(source), source.folder / CONFIG, settings.vocab
  names = chameleon_ids.read_names(source, tokenizer.read_tokenizer(source.folder, rows))
  codes, sizes = len(chameleon_ids.image_ids(names, path)), chameleon.image_sizes(source)
  needed = {
    "model": model | {"vocab_size": rows},
    "vocab": {"text_size": rows - codes, "image_size": codes, "template": "chameleon"},
    "vqgan": {"resolution": sizes.resolution, "downsample": sizes.downsample},
  }
  _check_fields(settings, source, needed)
  theirs = chameleon_ids.permutation(names, vocab, path)
  found = chameleon.read_images(source)
  decoder, encoder = chameleon.tensors(source, settings.model, theirs)
  ids = {int(theirs[i]): i for i in range(vocab.num_special, vocab.text_size)}
  return Import(source, needed, decoder, ids, [NOTE], Published(theirs, found, encoder))


def _check_fields(settings: Settings, source: SourceCheckpoint, needed: dict[str, dict]) -> None:
  """Raises UserError, with the flags to add, if the config has not the fields in `needed`."""
  differing = {
    section: {k: v for k, v in fields.items() if getattr(getattr(settings, section), k) != v}
    for section, fields in needed.items()
  }
  if given := flags(differing):
    raise UserError(f"{source.folder} has another model than the config: add the flags {given}")


def _own_tensors(source: SourceCheckpoint, config: ModelConfig) -> list[Tensor]:
  """Returns the tensors of an export of this project, which need no conversion."""
  shapes = layouts.shapes_of(config)
  source.check_names(shapes)
  for name, shape in shapes.items():
    source.tensors.check_shape(name, shape)
  return [
    Tensor(name, shape, "float32", functools.partial(source.tensors.read, name))
    for name, shape in shapes.items()
  ]


@foreign.reads("an export of this project")
def _own_fields(source: SourceCheckpoint) -> dict[str, dict]:
  """Returns the config fields that an export of this project needs.

  A model with rotary positions accepts any `max_positions`.
  """
  needed = layouts.config_of(dict(source.described))
  if FAMILIES[needed["model"]["family"]].rotary:
    del needed["model"]["max_positions"]
  return needed


def _end_of_text(source: SourceCheckpoint, rows: int) -> int | None:
  """Returns the end-of-text id of a published model, or None if config.json has no valid one."""
  result = source.described.get("eos_token_id")
  first = result[0] if isinstance(result, list) and result else result
  return first if type(first) is int and 0 <= first < rows else None


def flags(fields: Mapping[str, Mapping[str, Any]], chosen: Collection[str] | None = None) -> str:
  """Returns command-line flags that set config fields.

  `fields` maps a section to a dict: field -> value. Only the fields in `chosen` ("section.field")
  are included; None includes all.

    flags({"model": {"width": 64, "num_layers": 2}}, chosen=["model.width"])
    "--config.model.width=64"
  """
  return " ".join(
    f"--config.{section}.{name}={value}"
    for section, values in fields.items()
    for name, value in values.items()
    if chosen is None or f"{section}.{name}" in chosen
  )


def write(settings: Settings, workdir: epath.PathLike, found: Import) -> list[str]:
  """Writes the text tokenizer and the folder `init` of a workdir, unless they are finished.

  `found` is the result of `plan` for `settings`. Returns sentences that say what was done.

  Raises:
    UserError: the workdir contains another tokenizer or other imported parameters, or a tensor
      contains NaNs or infinities.
  """
  workdir, digests = epath.Path(workdir), found.source.digests()
  lines = [*describe(found), *found.notes]
  lines += _write_tokenizer(settings, workdir, found, digests)
  folder = workdir / INIT
  identity = {name: table.identity(settings, "train")[name] for name in ("model", "vocab")}
  files = (CONFIG, tensor_files.INDEX, "*.safetensors", f"{initial.PUBLISHED}/*")
  with stages.once(folder, {**identity, "source": digests}, files=files) as summary:
    if summary is not None:
      tensor_files.remove(folder)
      described, dtypes = layouts.hf_config(settings.model, settings.vocab), _dtypes(found.tensors)
      write_json(folder / CONFIG, described | {"dtype": dtypes[0]})
      if (workdir / TEXT / text.TOKENIZER).exists():
        text.copy_files(workdir / TEXT, folder)
      if (found.source.folder / training_data.FILE).exists():
        write_json(folder / training_data.FILE, training_data.read(found.source.folder))
      if found.published:
        chameleon.keep(folder / initial.PUBLISHED, found.source, found.published)
      tensor_files.write(folder, found.tensors)
      parameters = sum(tensor.size for tensor in found.tensors)
      summary.update({training_data.IMPORTED: str(found.source.folder), "parameters": parameters})
      summary[SETTINGS] = dataclasses.asdict(settings)
      summary[initial.IMAGES_DIGEST] = digest(found.source.folder / initial.IMAGE_TOKENIZER)
      lines.append(f"{folder}: {parameters:,} parameters in {', '.join(dtypes)}.")
  if found.published:
    lines += images.write(settings, workdir / "vqgan", found.published.images)
  return lines


def _dtypes(tensors: list[Tensor]) -> list[str]:
  """Returns the dtypes of tensors, that of the most elements first."""
  sizes = collections.Counter[str]()
  for tensor in tensors:
    sizes[tensor.dtype] += tensor.size
  return [name for name, _ in sizes.most_common()]


def _write_tokenizer(
  settings: Settings, workdir: epath.Path, found: Import, digests: dict
) -> list[str]:
  """Writes the text tokenizer of a workdir, or checks that it comes from the checkpoint."""
  source, folder = found.source, workdir / TEXT
  if source.is_own and not digests["tokenizer"]:
    return [
      f"{source.folder} has no tokenizer: it must have been trained with the one in {workdir}."
    ]
  done = folder / stages.DONE
  same = digest(folder / text.TOKENIZER) == digest(source.folder / text.TOKENIZER)
  if source.is_own and same and done.exists():
    return []
  if done.exists() and not text.was_imported(folder):
    raise UserError(
      f"the tokenizer in {folder} was trained, and its ids differ from {source.folder}: use "
      "another --workdir, or delete that folder."
    )
  config = table.identity(settings, TEXT) | {"inputs": {text.IMPORTED: digests["tokenizer"]}}
  config["command"] = text.IMPORTED
  notes: list[str] = []
  with stages.once(folder, config, files=table.STAGES[TEXT].files) as summary:
    if summary is not None:
      notes = _make_tokenizer(settings, folder, found)
      summary.update(imported_from=str(source.folder))
  return [f"{folder}: {'; '.join(notes)}."] if notes else []


def _make_tokenizer(settings: Settings, folder: epath.Path, found: Import) -> list[str]:
  """Writes the files of the text tokenizer. Returns how it differs from the source's tokenizer."""
  source, vocab = found.source.folder, settings.vocab
  if found.ids:
    described = tokenizer.read_tokenizer(source, found.source.size("vocab_size", 0))
    made, notes = tokenizer.rewrite(described, found.ids, vocab, spaced=not found.published)
    text.save_tokenizer(made, vocab, settings.text_tokenizer, folder)
    return notes
  text.TextTokenizer(source, vocab)  # Raises an error if the ids do not fit.
  text.copy_files(source, folder)
  return ["copied without changes"]


def describe(found: Import) -> list[str]:
  """Returns sentences that describe a checkpoint."""
  source, model = found.source, found.fields["model"]
  names = source.tensors.names
  dtypes = sorted({source.tensors.dtype(name) for name in names})
  return [
    f"{source.folder}: {source.described['model_type']}, {model['num_layers']} layers of width "
    f"{model['width']:,}, {source.tensors.count:,} parameters in {', '.join(dtypes)}."
  ]


def _own_notes(source: SourceCheckpoint) -> list[str]:
  """Returns sentences about the vocabulary of an export of this project."""
  notes = ["a model of this project: parameters and vocabulary do not change."]
  if (images := (source.folder / initial.IMAGE_TOKENIZER).parent).exists():
    notes.append(
      f"it was trained with the image codes of {images}: run "
      f"`cm3leon import_vqgan --source={images}` instead of cm3leon train_vqgan."
    )
  return notes
