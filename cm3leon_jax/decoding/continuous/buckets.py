"""Rounds the lengths of requests up to buckets, so that requests share compiled programs."""

# M parts of a plan, I tokens of an image, S guidance streams.

import math
from typing import NamedTuple

from cm3leon_jax.config.sampling import SamplingConfig
from cm3leon_jax.decoding import batch as batch_lib
from cm3leon_jax.decoding import grammar
from cm3leon_jax.decoding.generator import Generator, GeneratorConfig
from cm3leon_jax.decoding.grammar import Grammar
from cm3leon_jax.decoding.loop import Static
from cm3leon_jax.decoding.request import Request
from cm3leon_jax.decoding.sampling.rows import Sampler

SHORT = 8  # Cache entries for the unconditional prompt: prefill reads two of its three tokens.


class Bucket(NamedTuple):
  """Compiled shapes and settings that the requests of a running batch share.

  Attributes:
    static: static arguments of the programs. `max_new_tokens` and `widths` are rounded up.
    parts: number of parts of a plan, M.
  """

  static: Static
  parts: int

  @property
  def stream_capacities(self) -> tuple[int, ...]:
    """Capacity of the cache of each stream, in tokens per slot."""
    return tuple(width + self.static.max_new_tokens for width in self.static.widths)

  @property
  def capacity(self) -> int:
    """Capacity of the caches of all streams together, in tokens per slot."""
    return sum(self.stream_capacities)

  def fits(self, other: "Bucket") -> bool:
    """Returns whether a request of this bucket may use a slot in a batch of bucket `other`.

    Sharing a batch saves time, since each step of a running batch reads all parameters. But `other`
    may have at most 3 times the capacity, since attention reads all cache entries.
    """
    if not self._compiled_as(other, self.static.sampler) or self.parts > other.parts:
      return False
    larger = [b >= a for a, b in zip(self.static.widths, other.static.widths)]
    larger += [b >= a for a, b in zip(self.stream_capacities, other.stream_capacities)]
    return all(larger) and other.capacity <= 3 * self.capacity

  def holds(self, request: Request, own: "Bucket") -> bool:
    """Returns whether a slot of this bucket can hold a request, even if most of it stays empty.

    `own` is the result of `bucket_of` for the request. A bucket that sorts all logits accepts any
    number of candidates.
    """
    sampler = self.static.sampler
    all_candidates = Sampler(0, 0, own.static.sampler.contrastive_k)
    sampler = sampler if sampler == all_candidates else own.static.sampler
    if not own._compiled_as(self, sampler) or own.parts > self.parts:
      return False
    new_tokens = grammar.max_new_tokens(request.plan)
    prompts = [len(prompt) - 1 for prompt in request.streams]
    fit = [prompt <= width for prompt, width in zip(prompts, self.static.widths)]
    return all(fit) and all(
      prompt + new_tokens <= capacity for prompt, capacity in zip(prompts, self.stream_capacities)
    )

  def _compiled_as(self, other: "Bucket", sampler: Sampler) -> bool:
    """Returns whether the buckets would differ only in sizes if this bucket had `sampler`."""
    names = ("widths", "max_new_tokens", "capacities")
    sizes = {name: getattr(other.static, name) for name in names}
    streams = len(self.static.widths), len(other.static.widths)
    return self.static._replace(sampler=sampler, **sizes) == other.static and len(set(streams)) == 1


def bucket_of(request: Request, sampling: SamplingConfig, generator: Generator) -> Bucket:
  """Returns the smallest bucket for a request. It has the lengths of the request, rounded up."""
  config, usual = generator.config, Sampler.of(generator.config.sampling)
  own = Sampler.of(sampling, len(request.streams))
  sampler = Sampler(
    _candidates(own.of_codes, usual.of_codes),
    _candidates(own.of_all, usual.of_all),
    own.contrastive_k,
  )
  most = batch_lib.bucket_length(config.positions)
  # The first prompt may be long. The other prompts are usually short and get a small width.
  smallest = [batch_lib.BUCKET, *[SHORT] * (len(request.streams) - 1)]
  widths = tuple(
    min(width_bucket(len(prompt) - 1, n), most) for prompt, n in zip(request.streams, smallest)
  )
  new_tokens = new_tokens_bucket(grammar.max_new_tokens(request.plan), config.image_tokens + 1)
  new_tokens = min(new_tokens, config.positions)
  compiled = config.model, Grammar(config.vocab, config.image_tokens), sampler
  static = Static(*compiled, config.cache_dtype, widths, new_tokens, (new_tokens,))
  return Bucket(static, max(4, 1 << len(request.plan).bit_length()))


def _candidates(asked: int, compiled: int) -> int:
  """Returns the number of candidates that a program sorts; 0 means all tokens."""
  return compiled if 0 < asked <= compiled else 0


def largest(own: Bucket, config: GeneratorConfig) -> Bucket:
  """Returns a bucket that can hold any request with S streams.

  `own` is the result of `bucket_of` for one such request. The first stream may use all positions.
  The second stream has space for an image, a sentinel for each row of a box, and a few words of an
  edit. The third stream is the unconditional prompt.
  """
  image = config.image_tokens
  second = batch_lib.bucket_length(image + math.isqrt(image) + 2 * batch_lib.BUCKET)
  streams = len(own.static.widths)
  widths = (batch_lib.bucket_length(config.positions), second, SHORT)[:streams]
  # With one stream, the entries for the prompt cover all positions, so generated tokens fit into
  # them, too.
  new_tokens = batch_lib.BUCKET if streams == 1 else image + 1
  sampler = Sampler(0, 0, own.static.sampler.contrastive_k)
  parts = 1 << min(3 * config.vocab.num_masks, config.positions).bit_length()
  static = own.static._replace(
    sampler=sampler, widths=widths, max_new_tokens=new_tokens, capacities=(new_tokens,)
  )
  return Bucket(static, max(4, parts))


def width_bucket(length: int, smallest: int = batch_lib.BUCKET) -> int:
  """Rounds the length of a prompt up to `smallest` or to BUCKET times 1, 2, 3, 4, 6, 8, 12, ...

  >>> [width_bucket(n) for n in (0, 32, 33, 65, 129, 200, 257)]
  [32, 32, 64, 96, 192, 256, 384]
  """
  if length <= smallest:
    return smallest
  units = -(-length // batch_lib.BUCKET)
  power = 1 << (units - 1).bit_length()
  return batch_lib.BUCKET * (power * 3 // 4 if units <= power * 3 // 4 else power)


def new_tokens_bucket(length: int, image: int) -> int:
  """Rounds a number of generated tokens up to `image` times a power of two, such as 1/2, 1 or 2.

  `image` is the number of tokens of an image, including its end token.

  >>> [new_tokens_bucket(n, 65) for n in (1, 33, 34, 65, 66, 131)]
  [33, 33, 65, 65, 130, 260]
  """
  entries = image
  while entries < length:
    entries *= 2
  while (half := -(-entries // 2)) >= max(length, batch_lib.BUCKET):
    entries = half
  return entries
