"""Exports StableHLO artifacts of `jax.export`: prefill, decode step, guided images, image codes.

A folder that `jax` alone serves, without this package: serve_example.py in it shows how. Weights
are no part of the artifacts, but arguments of each; they are in safetensors files. Batch, prompt
slots and number of text tokens are symbolic: one artifact serves all, and is compiled for each. An
artifact names no devices: it runs on one, or on several that split its batch. The calling
convention and the digests of all files are in manifest.json, which is written last.
"""

# b samples, p and u slots of prompts, g tokens to generate, m parts of a plan.

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import importlib.resources

from etils import epath
import jax
import jax.export
import numpy as np
from safetensors import numpy as safetensors

import cm3leon_jax
from cm3leon_jax.config import UserError
from cm3leon_jax.decoding import grammar
from cm3leon_jax.decoding.params import prepare
from cm3leon_jax.export.serving_functions import (
  IMAGE_SETTINGS,
  TEXT_SETTINGS,
  Functions,
  named,
)
from cm3leon_jax.io import digest, replacing, write_json
from cm3leon_jax.mesh import unsplit
from cm3leon_jax.settings import Settings
from cm3leon_jax.tokenizers.text import TOKENIZER
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer

MANIFEST = "manifest.json"
EXAMPLE = "serve_example.py"
PLATFORMS = ("cpu", "cuda", "tpu")
SHARD_BYTES = 5_000_000_000
KINDS = ("DONE", "CODES", "TEXT", "EOSS", "MASK", "END", "DOCUMENT")  # Of parts of a plan.


def export(
  folder: epath.PathLike,
  params: dict,
  settings: Settings,
  image_tokenizer: ImageTokenizer,
  text_tokenizer_folder: epath.PathLike,
  weight_dtype: str = "compute",
) -> dict:
  """Writes the artifacts, their weights, the text tokenizer's file and an example.

  Args:
    folder: an earlier export in it is replaced, its manifest first.
    params: of the decoder, on any mesh.
    settings: of the run: `model` (its dtype is that of the weights), `vocab`, `sampling`.
    image_tokenizer: of the run.
    text_tokenizer_folder: of the run.
    weight_dtype: `compute`, or `int8` for the products of the decoder's blocks.

  Returns:
    {"parameters", "bytes", "artifacts": bytes of each}.

  Raises:
    UserError: `flatbuffers`, which `jax.export` needs to write and read artifacts, is missing.
  """
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / MANIFEST).unlink(missing_ok=True)  # Half an export has none.
  for file in folder.glob("*.safetensors"):
    file.unlink()
  with unsplit(), _no_locations():
    decoder = prepare(
      jax.device_get(params), config=settings.model, vocab=settings.vocab, dtype=weight_dtype
    )
    weights = {"decoder": decoder, "image_tokenizer": image_tokenizer.params}
    types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), weights)
    functions = Functions(
      settings.model, settings.vocab, settings.sampling, image_tokenizer, types
    )
    exported = {name: _export(*call) for name, *call in calls(functions)}
  artifacts = {}
  for name, artifact in exported.items():
    file = folder / f"{name}.stablehlo"
    with replacing(file) as stream:
      stream.write(_serialized(artifact))
    artifacts[name] = _described(artifact, file)
  files = _write_weights(folder, {name: np.asarray(x) for name, x in named(weights).items()})
  for name, source in (
    (TOKENIZER, epath.Path(text_tokenizer_folder) / TOKENIZER),
    (EXAMPLE, epath.Path(str(importlib.resources.files(__package__))) / EXAMPLE),
  ):
    (folder / name).write_text(source.read_text())
  write_json(
    folder / MANIFEST,
    {
      "cm3leon_jax": cm3leon_jax.__version__,
      "jax": jax.__version__,
      "calling_convention": exported["prefill"].calling_convention_version,
      "platforms": list(PLATFORMS),
      **_about(settings, image_tokenizer),
      "weights": {name: _array(x) for name, x in named(types).items()},
      "artifacts": artifacts,
      "digests": {name: digest(folder / name) for name in sorted([*files, TOKENIZER])}
      | {x["file"]: digest(folder / x["file"]) for x in artifacts.values()},
    },
  )
  sizes = {name: artifact["bytes"] for name, artifact in artifacts.items()}
  return {
    "parameters": sum(x.size for x in jax.tree.leaves(params)),
    "bytes": sum((folder / name).stat().length for name in files) + sum(sizes.values()),
    "artifacts": sizes,
  }


def calls(functions: Functions) -> Iterator[tuple[str, Callable, dict, dict]]:
  """Yields name, function, types of the weights and of the arguments of each artifact."""
  weights, codes = named(functions.weights), functions.image_tokens
  side = functions.image_tokenizer.config.resolution

  def ids(*shape):
    return jax.ShapeDtypeStruct(shape, np.int32)

  def settings(b, names):
    return {
      name: jax.ShapeDtypeStruct((b,), np.int32 if "top_k" in name else np.float32)
      for name in names
    }

  def seeds(b):
    return jax.ShapeDtypeStruct((b,), np.uint32)

  b, p, g, m = jax.export.symbolic_shape("b, p, g, m")
  arguments = {"prompts": ids(b, p), "plan": ids(b, m, 3), "seeds": seeds(b), "ids": ids(b, g)}
  yield "prefill", functions.prefill, weights, arguments
  loop = functions.state_types(weights, **arguments)
  state = {**named(loop), "plan": arguments["plan"], "seeds": arguments["seeds"]}
  step = {"state": state, **settings(b, IMAGE_SETTINGS + TEXT_SETTINGS)}
  yield "decode_step", functions.decode_step(loop), weights, step
  b, p, u = jax.export.symbolic_shape("b, p, u", constraints=["u <= p"])
  guided = {"prompts": ids(b, p), "unconditional": ids(b, u), "seeds": seeds(b)}
  guided |= settings(b, ("guidance", *IMAGE_SETTINGS))
  yield "generate_image", functions.generate_image, weights, guided
  (b,) = jax.export.symbolic_shape("b")
  images = jax.ShapeDtypeStruct((b, side, side, 3), np.uint8)
  yield "encode_image", functions.encode_image, weights, {"images": images}
  yield "decode_image", functions.decode_image, weights, {"tokens": ids(b, codes)}


@contextlib.contextmanager
def _no_locations() -> Iterator[None]:
  """Keeps the paths of this machine's source files out of the artifacts."""
  name = "jax_traceback_in_locations_limit"
  before = getattr(jax.config, name)
  jax.config.update(name, 0)
  try:
    yield
  finally:
    jax.config.update(name, before)


def _export(function: Callable, weights: dict, arguments: dict) -> jax.export.Exported:
  return jax.export.export(jax.jit(function), platforms=PLATFORMS)(weights, **arguments)


def _serialized(artifact: jax.export.Exported) -> bytes:
  try:
    return bytes(artifact.serialize())
  except ImportError as error:
    raise UserError(
      "jax.export writes and reads artifacts by the package flatbuffers, which is not installed: "
      "pip install flatbuffers."
    ) from error


def _array(x) -> dict:
  """Describes an array; a symbolic size is its text, as in ["b", "p + g"]."""
  sizes = [n if isinstance(n, int) else str(n) for n in x.shape]
  return {"dtype": str(x.dtype), "shape": sizes}


def _described(artifact: jax.export.Exported, file: epath.Path) -> dict:
  """Describes the arguments after the weights, and the results."""
  _, arguments = jax.tree.unflatten(artifact.in_tree, artifact.in_avals)
  results = jax.tree.unflatten(artifact.out_tree, artifact.out_avals)
  return {
    "file": file.name,
    "bytes": file.stat().length,
    "arguments": jax.tree.map(_array, arguments),
    "results": jax.tree.map(_array, results),
  }


def _about(settings: Settings, image_tokenizer: ImageTokenizer) -> dict:
  """Describes what a server needs to make prompts: vocabulary, sizes, defaults of sampling."""
  vocab, sampling = settings.vocab, settings.sampling
  names = ("guidance", *IMAGE_SETTINGS, *TEXT_SETTINGS)
  return {
    "vocab": {
      **dataclasses.asdict(vocab),
      **{name: getattr(vocab, name) for name in ("pad", "eos", "unk", "brk", "eoss")},
      "mask_0": vocab.mask(0),
    },
    "plan_kinds": {kind: getattr(grammar, kind) for kind in KINDS},
    "image_tokens": image_tokenizer.config.image_tokens,
    "resolution": image_tokenizer.config.resolution,
    "positions": settings.data.sequence_length,
    "sampling": {name: getattr(sampling, name) for name in names},
    "guidance_schedule": sampling.guidance_schedule,
  }


def _write_weights(folder: epath.Path, weights: dict[str, np.ndarray]) -> list[str]:
  """Writes safetensors files of at most `SHARD_BYTES`; returns their names."""
  shards: list[dict[str, np.ndarray]] = [{}]
  for name, x in weights.items():
    if shards[-1] and sum(y.nbytes for y in shards[-1].values()) + x.nbytes > SHARD_BYTES:
      shards.append({})
    shards[-1][name] = x
  names = []
  for i, shard in enumerate(shards, 1):
    names.append(f"model-{i:05d}-of-{len(shards):05d}.safetensors")
    with replacing(folder / names[-1]) as file:
      file.write(safetensors.save(shard))
  return names
