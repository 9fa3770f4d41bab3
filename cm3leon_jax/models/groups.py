"""Splits a decoder's parameters into groups that are trained and parameters that are frozen."""

# K layers, D width, V vocabulary, C image codes.

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from cm3leon_jax.config.groups import Groups, Tuned
from cm3leon_jax.config.model import AdapterConfig, ModelConfig
from cm3leon_jax.mesh import spec
from cm3leon_jax.models import adapters, transformer

TABLES = ("embed", "head")


def init(model: ModelConfig, tuned: Tuned | None, key: Key[Array, ""]) -> dict:
  """Initializes the trained parameters of a run in fp32, sharded over the current mesh.

  They are adapters, groups of the decoder's parameters, or, if `tuned` is None, all of them.
  """
  if isinstance(tuned, AdapterConfig):
    return adapters.init(model, tuned, key)
  params = transformer.init_params(model, key)
  return params if tuned is None else split(params, tuned, model)


def merge(base: dict, trained: dict, tuned: Tuned, model: ModelConfig) -> dict:
  """Returns the parameters of a decoder: those of `base` with what was trained.

  The result has the dtype of `base`, from which the arrays that are entirely trained may be absent.
  """
  if isinstance(tuned, AdapterConfig):
    return adapters.merge(base, trained, tuned)
  dtype = jax.tree.leaves(base)[0].dtype
  joined = join(rest(base, tuned), trained, tuned)
  if "blocks" in trained and "layers" not in tuned.names:
    layers = jnp.array(tuned.layers(model))
    joined["blocks"] = jax.tree.map(
      lambda x, new: x.at[layers].set(new.astype(dtype)), joined["blocks"], trained["blocks"]
    )
  return jax.tree.map(lambda x: x.astype(dtype), joined)


def split(params: dict, groups: Groups, model: ModelConfig) -> dict:
  """Selects the trained parameters, in fp32.

    Groups(("head.image", "layers.2-3"), text_size)
    {"head": [C, D], "blocks": {"qkv": [2, 3, D, N, H], ...}}

  The rows of image codes are sharded over D, because C may be too small for the mesh.
  """
  trained = {name: params[name] for name in _whole(groups) & params.keys()}
  for name in TABLES:
    if first := groups.first_row(name):
      # In two steps, because XLA would replicate the table if it had to move both axes at once.
      table = jax.sharding.reshard(params[name], spec("vocab", "embed"))
      trained[name] = jax.sharding.reshard(table, spec(None, "embed"))[first:]
  if (layers := groups.layers(model)) and "layers" not in groups.names:
    cut = slice(layers.start, layers.stop)
    trained["blocks"] = jax.tree.map(lambda x: x[cut], params["blocks"])
  return jax.tree.map(lambda x: x.astype(jnp.float32), trained)


def rest(params: dict, tuned: Tuned) -> dict:
  """Returns the parameters without the arrays that are entirely trained."""
  whole = _whole(tuned) if isinstance(tuned, Groups) else set()
  return {name: x for name, x in params.items() if name not in whole}


def _whole(groups: Groups) -> set[str]:
  """Returns the parameters that are entirely trained, some of which a family does not have."""
  parts = {"embed": {"embed", "positions"}, "head": {"head"}, "layers": {"blocks", "final_norm"}}
  return {param for name, params in parts.items() if name in groups.names for param in params}


def join(base: dict, trained: dict, groups: Groups) -> dict:
  """Adds trained parameters to `rest`; where only some layers are trained, its layers stay.

  A table with trained rows has the wider dtype of both parts. It has the sharding of a table.
  """
  rows = {name: trained[name] for name in TABLES if groups.first_row(name)}
  whole = {name: x for name, x in trained.items() if name in _whole(groups)}
  return {**base, **whole, **{name: _with_rows(base[name], x) for name, x in rows.items()}}


def _with_rows(table: Float[Array, "V D"], rows: Float[Array, "C D"]) -> Float[Array, "V D"]:
  """Replaces the last rows of a table. Each device picks its rows, which it got from all others."""
  first = len(table) - len(rows)
  ids = jax.sharding.reshard(jnp.arange(-first, len(rows)), spec("vocab_stored"))
  rows = jax.sharding.reshard(rows, spec(None, None))
  picked = rows.at[jnp.maximum(ids, 0)].get(out_sharding=spec("vocab_stored", None))
  return jnp.where(ids[:, None] >= 0, picked, table)
