"""The programs that are compiled ahead of time: the train step and the guided decoder, lowered as they are run."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from cm3leon_jax.aot.topology import abstract
from cm3leon_jax.config import UserError
from cm3leon_jax.data.pipeline import FIELDS
from cm3leon_jax.decoding.generate import generate_images
from cm3leon_jax.decoding.grammar import TextToImage
from cm3leon_jax.mesh import batch_shards, spec
from cm3leon_jax.models import transformer
from cm3leon_jax.training.train import check_batch, compile_steps

STREAMS = 2  # Guidance: conditional and unconditional.


def count_params(settings, mesh: jax.sharding.Mesh) -> int:
  """Parameters of the config's decoder."""
  with jax.set_mesh(mesh):
    return transformer.count_params(jax.eval_shape(lambda: transformer.init_params(settings.model, jax.random.key(0))))


def train_step(settings, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
  """The step that `launch.train` would run on `mesh` with this config. Raises UserError if the batch does not fit the mesh."""
  rows, length = settings.train.global_batch_size, settings.data.sequence_length
  with jax.set_mesh(mesh):
    check_batch(settings.train)
    steps = compile_steps(settings.model, settings.optimizer, settings.train, settings.vocab, settings.seed)
    sharding = NamedSharding(mesh, spec("batch", "length"))
    batch = {name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=sharding) for name, dtype in FIELDS.items()}
    return steps.train.lower(abstract(jax.eval_shape(steps.init), mesh), batch)


def guided_decoder(settings, mesh: jax.sharding.Mesh, prompts: int, positions: int) -> jax.stages.Lowered:
  """`generate_images` for `prompts` prompts of two streams each; `positions`: cache slots, prompt and image together.

  Parameters are in the compute dtype, as a server would hold them.
  """
  model, sampling = settings.model, settings.sampling
  grammar = TextToImage(settings.vocab, settings.vqgan.image_tokens)
  slots = positions - grammar.image_tokens
  if slots < 1:
    raise UserError(f"--decode_positions is {positions}; an image takes {grammar.image_tokens} of them, the prompt the rest.")
  with jax.set_mesh(mesh):
    shards = batch_shards()
    if prompts % shards:
      raise UserError(f"--decode_batch is {prompts}; mesh.data x mesh.fsdp x mesh.fsdp_inner = {shards} must divide it.")
    cast = lambda x: x.astype(jnp.dtype(model.dtype))
    make = lambda: jax.tree.map(cast, transformer.init_params(model, jax.random.key(0)))
    params = abstract(jax.eval_shape(make), mesh)
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec(*[None] * len(shape))))
    return generate_images.lower(
      params,
      array(jnp.int32, prompts, STREAMS, slots),
      array(jnp.bool_, prompts, STREAMS, slots),
      array(jnp.float32, STREAMS),
      array(jnp.uint32, prompts),
      array(jnp.float32),
      array(jnp.float32),
      config=model,
      grammar=grammar,
      top_k=sampling.top_k,
    )
