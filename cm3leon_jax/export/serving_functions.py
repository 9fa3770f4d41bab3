"""Defines the functions of a StableHLO export, which take flat dicts of arrays and need no mesh.

The functions wrap the decoding loop and the image tokenizer, so a server does not need this
package. Image codes are represented as token ids. Prompts are padded with `<pad>` on the left.
"""

# b samples, p and u padded prompt lengths, I tokens per image, S guidance streams, L tokens of a
# row.

from collections.abc import Mapping
import dataclasses
import itertools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, PyTree, UInt8, UInt32
import numpy as np

from cm3leon_jax.config.model import ModelConfig
from cm3leon_jax.config.sampling import SamplingConfig
from cm3leon_jax.decoding import loop as loop_lib
from cm3leon_jax.decoding import programs as compile_lib
from cm3leon_jax.decoding.batch import BUCKET, Padded, Prompts
from cm3leon_jax.decoding.control import Control
from cm3leon_jax.decoding.grammar import CODES, Grammar, Part, plan_array
from cm3leon_jax.decoding.loop import Static
from cm3leon_jax.decoding.sampling.guidance import scheduled
from cm3leon_jax.decoding.sampling.rows import Sampler, SamplingValues
from cm3leon_jax.tokenizers import vqgan
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from cm3leon_jax.vocab import VocabLayout

Named: TypeAlias = dict[str, Any]  # Maps dotted names to arrays or their types.
Tokens: TypeAlias = Int32[Array, "b _"]
Seeds: TypeAlias = UInt32[Array, " b"]
IMAGE_SETTINGS = ("temperature", "top_k", "top_p")


def named(tree: PyTree) -> Named:
  """Maps the dotted path of each leaf of a tree to the leaf."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def filled(types: PyTree, arrays: Mapping[str, Any]) -> PyTree:
  """Returns a tree with the structure of `types` and the leaves in `arrays`. Inverts `named`."""
  return jax.tree.unflatten(jax.tree.structure(types), [arrays[name] for name in named(types)])


def aligned_positions(
  tokens: Int32[Array, "b L"], vocab: VocabLayout, align_images: bool
) -> Int32[Array, "b L"]:
  """Computes `positions.positions_of` for rows with padding on the left, which gets position 0."""
  length = tokens.shape[1]
  valid = tokens != vocab.pad
  at = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], tokens.shape)
  first = length - valid.sum(axis=1, keepdims=True, dtype=jnp.int32)
  if not align_images:
    return jnp.where(valid, at - first, 0)

  # Returns, for each token, the index of the last marked token up to it; -1 if there is none.
  def latest(marked: Bool[Array, "b L"]) -> Int32[Array, "b L"]:
    return jax.lax.cummax(jnp.where(marked, at, -1), axis=1)

  # Returns, for each token, the index of the first marked token from it on; L if there is none.
  def following(marked: Bool[Array, "b L"]) -> Int32[Array, "b L"]:
    return jax.lax.cummin(jnp.where(marked, at, length), axis=1, reverse=True)

  def take(x: Int32[Array, "b L"], index: Int32[Array, "b L"]) -> Int32[Array, "b L"]:
    return jax.vmap(lambda row, i: row[i])(x, jnp.clip(index, 0, length - 1))

  is_image, is_break = vocab.is_image(tokens), tokens == vocab.brk
  ends = jnp.pad(is_image, ((0, 0), (1, 0)))[:, :-1] & is_break  # <break> after a code.
  begins = jnp.pad(ends, ((0, 0), (1, 0)))[:, :-1] | (at == first)
  next_begin = jnp.pad(following(begins), ((0, 0), (0, 1)), constant_values=length)[:, 1:]
  code = following(is_image)
  separator = take(latest(is_break | (tokens == vocab.eos)), code)
  anchors = jnp.where(code < next_begin, jnp.maximum(at, separator + 1), at)
  # A unit without image codes continues the positions of the unit before it.
  of_unit = latest(begins & ((code < next_begin) | (at == first)))
  return jnp.where(valid, at - take(anchors, of_unit), 0)


@dataclasses.dataclass(frozen=True)
class Functions:
  """Defines the functions that a server calls, for one decoder and image tokenizer.

  Every method takes `weights`, the arrays of `named({"decoder": ..., "image_tokenizer": ...})`, and
  keyword arguments. A method with several results returns a dict.

  Attributes:
    sampling: settings that the export fixes: `guidance_schedule`, and the maximum value of `top_k`.
    image_tokenizer: only its config and its number of codes are used, not its parameters.
    weights: tree of the types of the weights.
  """

  model: ModelConfig
  vocab: VocabLayout
  sampling: SamplingConfig
  image_tokenizer: ImageTokenizer
  weights: dict

  def _static(self, widths: tuple = (), capacities: tuple = ()) -> Static:
    sampler = Sampler.of(dataclasses.replace(self.sampling, method="top_p"))
    codes = self.image_tokenizer.config.image_tokens
    grammar = Grammar(self.vocab, codes)
    return Static(self.model, grammar, sampler, "compute", widths, codes, capacities)

  def _prompts(self, streams: list[Tokens]) -> Prompts:
    """Collects the prompts of S streams, longest stream first."""
    widths = [x.shape[1] for x in streams]
    wide = [jnp.pad(x, ((0, 0), (widths[0] - x.shape[1], 0))) for x in streams]  # <pad> is 0.
    rows = jnp.reshape(jnp.stack(wide, axis=1), (-1, widths[0]))
    # The token after a prompt is the first code of an image; its position does not depend on which.
    after = jnp.full_like(rows[:, :1], self.vocab.text_size)
    positions = aligned_positions(
      jnp.concatenate([rows, after], axis=1), self.vocab, self.model.align_images
    )
    # The last token of a prompt is the input of the first decoding step, not of the prefill.
    # Therefore the tokens are shifted by one here.
    before = ((0, 0), (1, 0))
    read = jnp.pad(rows[:, :-1], before)
    return Prompts(
      prefixes=None,
      rests=Padded(read, read != self.vocab.pad, jnp.pad(positions[:, :-2], before)),
      prefix_of=jnp.zeros_like(rows[:, 0]),
      row=jnp.arange(rows.shape[0], dtype=jnp.int32),
      last=rows[:, -1],
      last_positions=positions[:, -2],
      next_positions=positions[:, -1],
    )

  def generate_image(
    self,
    weights: Named,
    *,
    prompts: Tokens,
    unconditional: Tokens,
    seeds: Seeds,
    guidance: Float32[Array, " b"],
    **settings: Array,
  ) -> Named:
    """Generates and decodes a guided image for each prompt.

    Args:
      prompts: int32 [b, p], padded on the left.
      unconditional: int32 [b, u], u <= p, prompts of the unconditional stream, padded on the left.
      seeds: uint32 [b].
      guidance: fp32 [b], the guidance weight alpha.
      **settings: one array [b] for each name in `IMAGE_SETTINGS`.

    Returns:
      images, uint8 [b, H, W, 3]; tokens, int32 [b, I]; and log_probs, fp32 [b, I], of the tokens in
      the guided distribution before temperature and filters.
    """
    codes, count = self.image_tokenizer.config.image_tokens, prompts.shape[0]
    plan = jnp.broadcast_to(plan_array([[Part(CODES, codes)]]), (count, 2, 3))
    share = scheduled(2.0, self.sampling.guidance_schedule, codes) - 1
    share = jnp.asarray(np.append(share, share[-1:])[None], jnp.float32)
    alpha = guidance[:, None] * share + (1 - share)
    values = SamplingValues(**SamplingValues.of(self.sampling)._asdict() | settings)
    off = jnp.zeros_like(seeds, bool)
    control = Control(plan, jnp.stack([alpha, 1 - alpha], axis=2), seeds, off, values)
    capacities = compile_lib.cache_capacities(BUCKET, codes)
    static = self._static((prompts.shape[1], unconditional.shape[1]), capacities[:1])
    read = self._prompts([prompts, unconditional])
    decoder = filled(self.weights, weights)["decoder"]
    loop = loop_lib.prefill(decoder.model, read, plan, static)
    for capacity, larger in itertools.zip_longest(capacities, capacities[1:]):
      loop = loop_lib.decode_steps(decoder, control, loop, static=self._static(), steps=codes)
      if larger:
        loop = loop_lib.grow(loop, by=larger - capacity)
    images = self.decode_image(weights, tokens=loop.ids)
    return {"images": images, "tokens": loop.ids, "log_probs": loop.log_probs}

  def encode_image(self, weights: Named, *, images: UInt8[Array, "b H W 3"]) -> Int32[Array, "b I"]:
    """Encodes images, uint8 [b, H, W, 3], to tokens, int32 [b, I]."""
    tokenizer, params = self.image_tokenizer, filled(self.weights, weights)["image_tokenizer"]
    codes = vqgan.encode(tokenizer.config, tokenizer.num_codes, params, images)
    return codes + self.vocab.text_size

  def decode_image(self, weights: Named, *, tokens: Int32[Array, "b I"]) -> UInt8[Array, "b H W 3"]:
    """Decodes tokens, int32 [b, I], to images, uint8 [b, H, W, 3]."""
    tokenizer, params = self.image_tokenizer, filled(self.weights, weights)["image_tokenizer"]
    codes = tokens - self.vocab.text_size
    return vqgan.decode(tokenizer.config, tokenizer.num_codes, params, codes)
