"""Exports artifacts of `jax.export`: guided images, and image codes in both directions.

A server needs only `jax` and the folder, not this package; see serve_example.py in the folder. The
weights are not part of the artifacts. They are in safetensors files and are an argument of each
artifact. Batch size and prompt length are symbolic, so one artifact can be compiled for any size.
An artifact is not tied to devices. It runs on one device, or on several that split the batch.
manifest.json contains the calling convention and the digests of all files, and is written last.
"""

# b samples, p and u padded prompt lengths.

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import importlib.resources
from typing import Any

from etils import epath
from flax import traverse_util
import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from cm3leon_jax import templates
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.decoding.params import prepare, prepare_layer
from cm3leon_jax.decoding.request import unconditional_prompt
from cm3leon_jax.export.formats import TrainedRun
from cm3leon_jax.export.serving_functions import IMAGE_SETTINGS, Functions, Named, named
from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.files.digests import digest
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.mesh import unsplit
from cm3leon_jax.tokenizers.text import TOKENIZER
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from cm3leon_jax.version import VERSION
from cm3leon_jax.weights import tensor_files
from cm3leon_jax.weights.stored import StoredParams
from cm3leon_jax.weights.tensor_files import Tensor

MANIFEST = "manifest.json"
SERVED = ("artifacts.py", "serve_example.py")  # Files of served/ that are copied to exports.
PLATFORMS = ("cpu", "cuda", "tpu")
BLOCKS = "blocks."


def write(folder: epath.PathLike, run: TrainedRun) -> dict:
  """Writes a run for `jax.export`: artifacts, weights, text tokenizer, a loader and an example.

  Artifacts compute in the dtype of the weights, and one layer of the decoder at a time is in
  memory. An earlier export in the folder is replaced, and its manifest is deleted first.

  Returns:
    {"parameters", "bytes", "artifacts": name -> bytes}.
  """
  folder, params, images = epath.Path(folder), run.params, run.trained.images
  model = run.settings.model.computing_in(run.choice.dtype)
  settings = dataclasses.replace(run.settings, model=model)
  weight_dtype = run.choice.quantize or "compute"
  folder.mkdir(parents=True, exist_ok=True)
  (folder / MANIFEST).unlink(missing_ok=True)  # An export without manifest is unfinished.
  tensor_files.remove(folder)
  with unsplit():
    types = weight_types(params, settings, images, weight_dtype)
    functions = Functions(settings.model, settings.vocab, settings.sampling, images, types)
    artifacts = _write_artifacts(folder, functions)
    tensors = weight_tensors(types, params, settings, images, weight_dtype)
    weights = tensor_files.write(folder, tensors)
  served = epath.Path(str(importlib.resources.files(__package__))) / "served"
  for source in (epath.Path(run.text_tokenizer) / TOKENIZER, *(served / name for name in SERVED)):
    (folder / source.name).write_text(source.read_text())
  files = [*weights, TOKENIZER, *SERVED, *(f"{name}.stablehlo" for name in artifacts)]
  vocab, sampling = settings.vocab, settings.sampling
  special = {name: getattr(vocab, name) for name in ("pad", "eos", "unk", "brk", "eoss")}
  manifest = {
    "cm3leon_jax": VERSION,
    "jax": jax.__version__,
    "vocab": {**vocab.sizes, **special, "mask_0": vocab.mask(0)},
    "prompt": {  # Ids before and after a caption, and the prompt without one.
      "start": templates.of(vocab).between[templates.START, templates.TEXT],
      "end": templates.of(vocab).between[templates.TEXT, templates.DRAWN],
      "unconditional": unconditional_prompt(vocab).tolist(),
    },
    "image_tokens": images.config.image_tokens,
    "resolution": images.config.resolution,
    "positions": settings.data.sequence_length,
    "sampling": {name: getattr(sampling, name) for name in ("guidance", *IMAGE_SETTINGS)},
    "guidance_schedule": sampling.guidance_schedule,
    "artifacts": artifacts,
    "weights": {name: _array(x) for name, x in named(types).items()},
    "digests": {name: digest(folder / name) for name in files},
  }
  write_json(folder / MANIFEST, manifest)
  return {
    "parameters": params.count,
    "bytes": sum((folder / name).stat().length for name in files),
    "artifacts": {name: about["bytes"] for name, about in artifacts.items()},
  }


def _write_artifacts(folder: epath.Path, functions: Functions) -> dict[str, dict]:
  """Writes an artifact for each result of `calls`. Returns a dict: name -> description."""
  artifacts = {}
  with _no_locations():
    for name, function, arguments in calls(functions):
      exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)
      artifact = exported(named(functions.weights), **arguments)
      path = folder / f"{name}.stablehlo"
      with replacing(path) as file:
        file.write(artifact.serialize())
      _, types = jax.tree.unflatten(artifact.in_tree, artifact.in_avals)
      results = jax.tree.unflatten(artifact.out_tree, artifact.out_avals)
      artifacts[name] = {
        "bytes": path.stat().length,
        "calling_convention": artifact.calling_convention_version,
        "platforms": list(artifact.platforms),
        "arguments": jax.tree.map(_array, types),
        "results": jax.tree.map(_array, results),
      }
  return artifacts


def weight_types(
  params: StoredParams, settings: Settings, image_tokenizer: ImageTokenizer, weight_dtype: str
) -> dict:
  """Returns a tree with the types of the weights, which are the first argument of each artifact."""
  shapes = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in params.shapes.items()}
  decoder = jax.eval_shape(
    functools.partial(prepare, config=settings.model, vocab=settings.vocab, dtype=weight_dtype),
    traverse_util.unflatten_dict(shapes, sep="."),
  )
  # Decoding uses `DecodeParams.head` instead of the untied output table.
  model = {name: x for name, x in decoder.model.items() if name != "head"}
  weights = {"decoder": decoder._replace(model=model), "image_tokenizer": image_tokenizer.params}
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), weights)


def weight_tensors(
  types: dict,
  params: StoredParams,
  settings: Settings,
  image_tokenizer: ImageTokenizer,
  weight_dtype: str,
) -> list[Tensor]:
  """Lists the weights of `weight_types`. `prepare` is applied to each only when it is written."""
  config, images = settings.model, named(image_tokenizer.params)

  @functools.lru_cache(maxsize=1)
  def layer(i: int) -> Named:
    names = [name for name in params.shapes if name.startswith(BLOCKS)]
    flat = {name.removeprefix(BLOCKS): params.read(name, i) for name in names}
    flat = {name: x.astype(jnp.dtype(config.dtype)) for name, x in flat.items()}
    arrays = jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(flat, sep="."))
    return named(prepare_layer(arrays, weight_dtype))

  def array(name: str) -> np.ndarray:
    part, _, rest = name.partition(".")
    if part == "image_tokenizer":
      return np.asarray(images[rest])
    if rest in ("head", "image_head"):
      table = params.read("embed" if config.traits.tied else "head")
      head = np.roll(table, settings.vocab.image_size, axis=0).T
      return head if rest == "head" else head[:, : settings.vocab.image_size]
    rest = rest.removeprefix("model.")
    if not rest.startswith(BLOCKS):
      return params.read(rest)
    number, _, rest = rest.removeprefix(BLOCKS).partition(".")
    return np.asarray(layer(int(number))[rest])

  return [
    Tensor(name, x.shape, str(x.dtype), functools.partial(array, name))
    for name, x in named(types).items()
  ]


def calls(functions: Functions) -> Iterator[tuple[str, Callable, dict]]:
  """Yields each artifact's name, function, and types of the arguments that follow the weights."""
  array, config = jax.ShapeDtypeStruct, functions.image_tokenizer.config
  b, p, u = jax.export.symbolic_shape("b, p, u", constraints=["u <= p"])
  kinds: dict[str, type] = dict.fromkeys(("guidance", *IMAGE_SETTINGS), np.float32)
  kinds |= {"seeds": np.uint32, "top_k": np.int32}
  prompts = {"prompts": array((b, p), np.int32), "unconditional": array((b, u), np.int32)}
  settings = {name: array((b,), kind) for name, kind in kinds.items()}
  yield "generate_image", functions.generate_image, prompts | settings
  (b,) = jax.export.symbolic_shape("b")
  images = array((b, config.resolution, config.resolution, 3), np.uint8)
  yield "encode_image", functions.encode_image, {"images": images}
  tokens = array((b, config.image_tokens), np.int32)
  yield "decode_image", functions.decode_image, {"tokens": tokens}


@contextlib.contextmanager
def _no_locations() -> Iterator[None]:
  """Keeps source file paths of this machine out of the artifacts."""
  name = "jax_traceback_in_locations_limit"
  before = getattr(jax.config, name)
  jax.config.update(name, 0)
  try:
    yield
  finally:
    jax.config.update(name, before)


def _array(x: Any) -> dict:
  """Describes an array or its type. A symbolic size becomes a string, as in ["b", "p + g"]."""
  sizes = [n if isinstance(n, int) else str(n) for n in x.shape]
  return {"dtype": str(x.dtype), "shape": sizes}
