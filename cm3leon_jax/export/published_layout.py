"""Exports a run that began from a Chameleon in the layout that it was imported from.

The files are those of the imported folder, with other decoder weights. `transformers` loads them as
ChameleonForConditionalGeneration, whose logits of image codes are masked; custom_generate.py reads
them below the mask.
"""

import dataclasses

from etils import epath
import numpy as np

from cm3leon_jax.export.formats import TrainedRun
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.run.initial import IDS, VQMODEL
from cm3leon_jax.run.source import PUBLISHED_IDS
from cm3leon_jax.vocab import VocabLayout
from cm3leon_jax.weights import int8, layouts, tensor_files
from cm3leon_jax.weights.stored_tensors import StoredTensors
from cm3leon_jax.weights.tensor_files import Tensor

CONFIG = "config.json"


def read_ids(published: epath.Path) -> np.ndarray:
  """Returns the published id of each of our ids, int [V]. `published`: see `initial.PUBLISHED`."""
  return np.array(read_json(published / IDS, {"theirs": list})["theirs"])


def write(folder: epath.PathLike, run: TrainedRun, published: epath.Path, drawing: dict) -> dict:
  """Writes a run in the layout of `published`, see `initial.PUBLISHED`. The weights are last.

  `drawing` is what custom_generate.py reads from `cm3leon` in config.json, with our ids.

  Returns:
    {"architecture", "published" (True), "parameters", "bytes"}.
  """
  folder, choice, layout = epath.Path(folder), run.choice, layouts.layout_of(run.settings.model)
  described, theirs = read_json(published / CONFIG, {}), read_ids(published)
  own = {PUBLISHED_IDS: True, **dataclasses.asdict(run.settings.vocab)}
  own |= _renumbered_ids(drawing, run.settings.vocab, theirs)
  described |= {"cm3leon": own, "dtype": choice.dtype}
  tensors = layouts.tensors_of(layout, run.params, choice.dtype)
  tables = {f"{layout.tables[name]}.weight" for name in ("embed", "head")}
  ours = np.argsort(theirs)
  tensors = [_renumbered(x, ours) if x.name in tables else x for x in tensors]
  if choice.quantize:
    described["quantization_config"] = int8.CONFIG
    tensors = int8.quantized(tensors)
  count = sum(tensor.size for tensor in tensors)
  for path in sorted(published.iterdir()):
    if path.name not in (CONFIG, IDS, VQMODEL):
      (folder / path.name).write_bytes(path.read_bytes())
  write_json(folder / CONFIG, described)
  encoder = StoredTensors(published, [VQMODEL])
  files = tensor_files.write(folder, [*tensors, *map(encoder.tensor, encoder.names)])
  return {
    "architecture": layout.architecture,
    "published": True,
    "parameters": count,
    "bytes": sum((folder / name).stat().length for name in files),
  }


def _renumbered_ids(drawing: dict, vocab: VocabLayout, theirs: np.ndarray) -> dict:
  """Returns `drawing` with the published ids, and those of `<pad>`, codes and end of an image."""
  return drawing | {
    "unconditional_prompt": theirs[drawing["unconditional_prompt"]].tolist(),
    "pad": int(theirs[vocab.pad]),
    "image_ids": theirs[vocab.text_size :].tolist(),
    "after_image": theirs[[vocab.image_end]].tolist(),
  }


def _renumbered(tensor: Tensor, ours: np.ndarray) -> Tensor:
  """Returns a table whose rows are in the order of the published ids."""
  return dataclasses.replace(tensor, make=lambda: tensor.make()[ours])
