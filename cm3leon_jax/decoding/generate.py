"""Text to image: prompts, one jitted function of prefill and scan, and the `Generator` around it."""

# S guidance streams, B prompts, P prompt slots, I image tokens, T = P + I cache slots, D width, V vocabulary.

from collections.abc import Sequence
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cm3leon_jax.config import UserError
from cm3leon_jax.decoding.cache import Cache
from cm3leon_jax.decoding.grammar import TextToImage
from cm3leon_jax.decoding.sampling import SamplingConfig, combine_streams, sample
from cm3leon_jax.mesh import RULES, batch_shards, shard, spec
from cm3leon_jax.models.attention import masked_attention
from cm3leon_jax.models.config import ModelConfig
from cm3leon_jax.models.transformer import bind
from cm3leon_jax.vocab import VocabLayout

BUCKET = 64  # Prompt slots are a multiple of it, so that prompts of similar length share one compiled program.


class Images(NamedTuple):
  """Outcome for B prompts.

  Attributes:
    codes: [B, I] int32 image codes in [0, image_size).
    log_probs: [B, I] fp32, log-probability of each under the guided distribution, before temperature and filters.
    end: [B] int32, the id drawn after the image: `</s>` or `<break>`.
  """

  codes: np.ndarray
  log_probs: np.ndarray
  end: np.ndarray


def conditional_prompt(vocab: VocabLayout, caption, neighbors: Sequence[Sequence] = ()) -> np.ndarray:
  """Retrieved documents, each a sequence of segments' ids, then the caption (CM3Leon, section 2.1).

    caption = [7 8], neighbors = [([5 6], [91 92])]:
    </s> 5 6 <break> 91 92 <break> 7 8 <break>

  Returns:
    [T] int32. Raises UserError if the caption is empty.
  """
  if not len(caption):
    raise UserError("a prompt is empty: give at least one word to draw.")
  segments = [s for document in neighbors for s in document] + [caption]
  return np.concatenate([[vocab.eos], *(part for s in segments for part in (s, [vocab.brk]))]).astype(np.int32)


def unconditional_prompt(vocab: VocabLayout) -> np.ndarray:
  """`</s> <mask:0> <break>`: what the conditioning drop of training made the model see."""
  return np.array([vocab.eos, vocab.mask(0), vocab.brk], np.int32)


def pad_left(prompts: Sequence[np.ndarray], slots: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
  """Prompts of unequal length -> ([B, slots] int32 ids, [B, slots] bool: which are real), real ones at the right."""
  tokens, valid = np.full((len(prompts), slots), pad, np.int32), np.zeros((len(prompts), slots), bool)
  for row, prompt in enumerate(prompts):
    tokens[row, slots - len(prompt) :] = prompt
    valid[row, slots - len(prompt) :] = True
  return tokens, valid


def _layers(model, x, positions, cache, attend):
  """Runs the stacked layers; `attend(cache, layer, q, k, v) -> (out, cache)`. Returns (hidden [R, L, D], cache)."""

  def layer(carry, inputs):
    x, cache = carry
    block, index = inputs

    def attend_and_store(q, k, v):
      nonlocal cache
      out, cache = attend(cache, index, q, k, v)
      return out

    return (block(x, positions, attend_and_store), cache), None

  (x, cache), _ = jax.lax.scan(layer, (x, cache), (model.blocks, jnp.arange(model.config.num_layers)))
  return model.final_norm(x), cache


def prefill(model, tokens, valid, cache):
  """Reads left-padded prompts into slots [0, P).

  Args:
    model: bound Transformer.
    tokens: [R, P] int32.
    valid: [R, P] bool, which of them are real.
    cache: empty Cache of R rows and at least P slots.

  Returns:
    (final hidden state of the last token [R, 1, D], cache).
  """
  length = tokens.shape[1]
  positions = jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0)
  # A padding query sees only masked keys: a uniform average, finite, and never read.
  mask = jnp.tril(jnp.ones((length, length), bool))[None, None] & valid[:, None, None, :]

  def attend(cache, layer, q, k, v):
    return masked_attention(q, k, v, mask), cache.write(layer, 0, k, v)

  hidden, cache = _layers(model, model.embed_tokens(tokens, positions), positions, cache, attend)
  return hidden[:, -1:], cache


def decode_step(model, tokens, positions, slot, seen, cache):
  """Reads one token a row into `slot`.

  Args:
    model: bound Transformer.
    tokens: [R] int32.
    positions: [R] int32, index of the token in its sample.
    slot: int32 scalar, the slot of the new token.
    seen: [R, T] bool, slots that the new token attends to, its own included.
    cache: Cache of R rows and T slots.

  Returns:
    (final hidden state [R, 1, D], cache).
  """

  def attend(cache, layer, q, k, v):
    cache = cache.write(layer, slot, k, v)
    return cache.attend(layer, q, seen[:, None, None, :]), cache

  positions = positions[:, None]
  return _layers(model, model.embed_tokens(tokens[:, None], positions), positions, cache, attend)


def _rows_axis(rows) -> str | None:
  """Rows of the output table are split like the vocabulary if they divide; two rows stay whole."""
  shape = jax.sharding.get_abstract_mesh().shape
  return None if len(rows) % shape[RULES["vocab"]] else "vocab"


def _draw(hidden, table, rows, state, grammar, weights, keys, temperature, top_p, top_k):
  """Guided draw of one of the ids `rows` for each prompt; hidden is [B * S, 1, D]. Returns (ids [B], log_probs [B])."""
  streams = weights.shape[0]
  axis = _rows_axis(rows)
  out = jnp.einsum("BLD,RD->BLR", hidden, table, preferred_element_type=jnp.float32, out_sharding=spec("batch", "length", axis))
  out = jnp.reshape(out, (-1, streams, len(rows)), out_sharding=spec("batch", None, axis))
  guided = shard(combine_streams(out.swapaxes(0, 1), weights), "batch", None)
  guided = jnp.where(grammar.legal(state, jnp.asarray(rows)), guided, -jnp.inf)
  index, log_probs = sample(guided, keys, temperature, top_k, top_p)
  return jnp.asarray(rows).at[index].get(out_sharding=spec("batch")), log_probs


@functools.partial(jax.jit, static_argnames=("config", "grammar", "top_k"))
def generate_images(params, tokens, valid, weights, seeds, temperature, top_p, *, config, grammar, top_k):
  """Prefill, then one scan over the image's tokens with the cache in its carry. Needs a mesh.

  Args:
    params: of the model `config`.
    tokens: [B, S, P] int32, left-padded prompts, the streams of a prompt side by side (so that a shard of the batch
      holds all of them). B must divide by the devices that the batch is split over.
    valid: [B, S, P] bool, which tokens are real.
    weights: [S] fp32, of the streams.
    seeds: [B] uint32; a prompt's result depends on its own only.
    temperature: as in SamplingConfig.
    top_p: likewise.
    config: static.
    grammar: TextToImage, static.
    top_k: as in SamplingConfig, static.

  Returns:
    (ids [B, I] int32, log_probs [B, I] fp32, end [B] int32).
  """
  batch, streams, slots = tokens.shape
  dtype = jnp.dtype(config.dtype)
  model = bind(config, jax.tree.map(lambda x: x.astype(dtype), params))
  fold = lambda x: shard(x.reshape(batch * streams, slots), "batch", None)
  tokens, valid = fold(tokens), fold(valid)
  keys = jax.vmap(jax.random.key)(shard(seeds, "batch"))
  pick = functools.partial(_draw, grammar=grammar, weights=weights, temperature=temperature, top_p=top_p, top_k=top_k)
  image_rows, end_rows = grammar.image_rows, grammar.end_rows
  head = model.output_table()
  rows_of = lambda rows: shard(head.at[rows].get(out_sharding=spec(None, None)), _rows_axis(rows), None)
  image_table, end_table = rows_of(image_rows), rows_of(end_rows)

  steps = grammar.image_tokens
  hidden, cache = prefill(model, tokens, valid, Cache.empty(config, batch * streams, slots + steps))
  lengths = valid.sum(axis=1, dtype=jnp.int32)
  seen = jnp.pad(valid, ((0, 0), (0, steps)), constant_values=True)

  def step(carry, t):
    hidden, cache, state = carry
    ids, log_probs = pick(hidden, image_table, image_rows, state, keys=jax.vmap(jax.random.fold_in, (0, None))(keys, t))
    every_stream = jnp.repeat(ids, streams, total_repeat_length=batch * streams, out_sharding=spec("batch"))
    visible = seen & (jnp.arange(slots + steps) <= slots + t)[None]
    hidden, cache = decode_step(model, every_stream, lengths + t, slots + t, visible, cache)
    return (hidden, cache, grammar.advance(state)), (ids, log_probs)

  state = shard(grammar.start(batch), "batch")
  (hidden, _, state), (ids, log_probs) = jax.lax.scan(step, (hidden, cache, state), jnp.arange(steps))
  end, _ = pick(hidden, end_table, end_rows, state, keys=jax.vmap(jax.random.fold_in, (0, None))(keys, steps))
  # Whole on every device: of several processes each can read them.
  return shard(ids.T, None, None), shard(log_probs.T, None, None), shard(end, None)


class Generator:
  """Draws pictures' codes for prompts; programs are compiled once per bucket of prompt length and of batch size.

  with jax.set_mesh(create_mesh(MeshConfig())):
    generator = Generator(model_config, params, vocab, SamplingConfig(), image_tokens=256)
    codes = generator.text_to_image([conditional_prompt(vocab, ids)], seeds=[0])
  """

  def __init__(self, config: ModelConfig, params, vocab: VocabLayout, sampling: SamplingConfig, image_tokens: int):
    self.config, self.params, self.vocab, self.sampling = config, params, vocab, sampling
    self.grammar = TextToImage(vocab, image_tokens)
    self.longest_prompt = config.max_positions - image_tokens

  def text_to_image(self, prompts: Sequence[np.ndarray], seeds: Sequence[int], guidance: float | None = None) -> np.ndarray:
    """[B, I] int32 codes of B prompts; see `images`."""
    return self.images(prompts, seeds, guidance).codes

  def images(self, prompts: Sequence[np.ndarray], seeds: Sequence[int], guidance: float | None = None) -> Images:
    """Draws one image a prompt, all in one batch, guided against the unconditional prompt.

    Args:
      prompts: B int32 id arrays, made by `conditional_prompt`.
      seeds: B integers in [0, 2^32); with the same seed a prompt gives the same image in any batch.
      guidance: weight of guidance; default: the sampling config's. Another value does not recompile.

    Raises:
      UserError: no prompt, a prompt that leaves no room for the image, or not one seed for each prompt.
    """
    self._check(prompts, seeds)
    batch, multiple = len(prompts), batch_shards()
    rows = multiple * 2 ** max(0, (-(-batch // multiple) - 1).bit_length())
    index = np.arange(rows) % batch
    longest = max(len(p) for p in prompts)
    slots = max(longest, min(-(-longest // BUCKET) * BUCKET, self.longest_prompt))
    conditional = pad_left(prompts, slots, self.vocab.pad)
    unconditional = pad_left([unconditional_prompt(self.vocab)] * batch, slots, self.vocab.pad)
    tokens, valid = (np.stack(pair, axis=1)[index] for pair in zip(conditional, unconditional))
    alpha = self.sampling.guidance if guidance is None else guidance
    ids, log_probs, end = jax.device_get(
      generate_images(
        self.params,
        tokens,
        valid,
        np.array([alpha, 1 - alpha], np.float32),
        np.asarray(seeds, np.uint32)[index],
        np.float32(self.sampling.temperature),
        np.float32(self.sampling.top_p),
        config=self.config,
        grammar=self.grammar,
        top_k=self.sampling.top_k,
      )
    )
    return Images(self.vocab.image_codes(ids[:batch]), log_probs[:batch], end[:batch])

  def _check(self, prompts, seeds) -> None:
    if not len(prompts) or len(prompts) != len(seeds):
      raise UserError(f"{len(prompts)} prompts and {len(seeds)} seeds: give at least one prompt and one seed for each.")
    longest = max(len(p) for p in prompts)
    if longest > self.longest_prompt:
      raise UserError(
        f"a prompt has {longest} tokens; at most {self.longest_prompt} leave room for {self.grammar.image_tokens} image tokens "
        f"in model.max_positions = {self.config.max_positions}: shorten it, or retrieve fewer documents."
      )
