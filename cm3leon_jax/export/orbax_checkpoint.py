"""Writes the format `orbax`: only the parameters, as a checkpoint that Orbax can restore.

  orbax.checkpoint.StandardCheckpointer().restore("/absolute/path/export/params")

This call returns a nested dict of numpy arrays. With a tree of `jax.ShapeDtypeStruct` as the second
argument, it returns JAX arrays on any mesh. `cm3leon train --init_from=FOLDER` starts a run from
the export. Orbax would need all parameters in memory to write them. Therefore TensorStore writes
the arrays layer by layer in Orbax's layout: an OCDBT database of Zarr arrays, and `_METADATA` with
the tree.
"""

from etils import epath
import tensorstore

from cm3leon_jax.export.formats import TrainedRun
from cm3leon_jax.files.atomic import absolute
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.run import exported, source
from cm3leon_jax.stages import table
from cm3leon_jax.tokenizers import text
from cm3leon_jax.weights import stored
from cm3leon_jax.weights.tensor_files import DTYPES, convert


def write(folder: epath.PathLike, run: TrainedRun) -> dict:
  """Writes the text tokenizer, config.json (model and vocab) and params/."""
  folder, params = absolute(folder), run.params
  folder.mkdir(parents=True, exist_ok=True)
  text.copy_files(run.text_tokenizer, folder)
  identity = table.identity(run.settings, "train")
  write_json(folder / "config.json", {part: identity[part] for part in ("model", "vocab")})
  for name in params.shapes:
    _write_array(folder / exported.ORBAX, params, name, run.choice.dtype)
  write_json(folder / source.TREE, _metadata(params))
  size = params.count * DTYPES[run.choice.dtype][1].itemsize
  return {"parameters": params.count, "bytes": size}


def _write_array(folder: epath.Path, params: stored.StoredParams, name: str, dtype: str) -> None:
  """Writes an array. Each layer of a stacked array becomes one chunk.

  Nothing is compressed. Compression saves little space for weights and needs more memory, because
  each thread keeps a buffer as large as its largest result.
  """
  shape = params.shapes[name]
  stacked = name.startswith(f"{stored.STACKED}.")
  spec = {
    **stored.array_spec(folder, name),
    "metadata": {"compressor": None},
    "store_data_equal_to_fill_value": True,
  }
  array = tensorstore.open(
    spec,
    create=True,
    dtype=dtype,
    shape=shape,
    chunk_layout=tensorstore.ChunkLayout(chunk_shape=(1, *shape[1:]) if stacked else shape),
  ).result()
  for index in [(i,) for i in range(shape[0])] if stacked else [()]:
    array[index].write(convert(name, params.read(name, *index), dtype)).result()


def _metadata(params: stored.StoredParams) -> dict:
  """Returns the content of `_METADATA`, which lists the path of every array.

  Key type 2 denotes a key of a dict.
  """
  tree = {}
  for name in params.shapes:
    keys = name.split(".")
    tree[str(tuple(keys))] = {
      "key_metadata": [{"key": key, "key_type": 2} for key in keys],
      "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
    }
  about = {"use_ocdbt": True, "use_zarr3": False, "store_array_data_equal_to_fill_value": True}
  return {"tree_metadata": tree, **about, "custom_metadata": None}
