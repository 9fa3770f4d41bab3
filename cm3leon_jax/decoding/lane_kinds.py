"""Kinds of lanes: what requests must have in common to share one, lengths rounded up to buckets."""

# M parts of a plan, I tokens of an image, S guidance streams.

import math
from typing import NamedTuple

from cm3leon_jax.decoding import batch as batch_lib
from cm3leon_jax.decoding import grammar
from cm3leon_jax.decoding.config import SamplingConfig
from cm3leon_jax.decoding.generator import Generator, GeneratorConfig
from cm3leon_jax.decoding.grammar import Grammar
from cm3leon_jax.decoding.programs import Static
from cm3leon_jax.decoding.request import Request
from cm3leon_jax.decoding.sampling import Sampler

SHORT = 8  # Slots for the unconditional prompt, of which prefill reads two tokens.


class Kind(NamedTuple):
  """What requests of one lane have in common.

  Attributes:
    static: of the programs; `longest` and `widths` are those of buckets.
    parts: M.
  """

  static: Static
  parts: int

  @property
  def rings(self) -> tuple[int, ...]:
    """Number of cache slots of each stream of a row."""
    return tuple(width + self.static.longest for width in self.static.widths)

  @property
  def slots(self) -> int:
    """Number of cache slots of a row, over all streams."""
    return sum(self.rings)

  def fits(self, lane: "Kind") -> bool:
    """Returns whether a request of this kind may join a lane of another, of at most 3 x its slots.

    Attention reads all slots of a lane, but a step of each lane reads all weights.
    """
    if not self._compiled_as(lane, self.static.sampler) or self.parts > lane.parts:
      return False
    larger = [b >= a for a, b in zip(self.static.widths, lane.static.widths)]
    larger += [b >= a for a, b in zip(self.rings, lane.rings)]
    return all(larger) and lane.slots <= 3 * self.slots

  def takes(self, request: Request, own: "Kind") -> bool:
    """Returns whether a lane of this kind can hold a request, however few of its slots are used.

    Args:
      request: of `request`.
      own: its `kind_of`. A lane that sorts all logits takes any number of candidates.
    """
    sampler = self.static.sampler
    all_candidates = Sampler(0, 0, own.static.sampler.contrastive_k)
    sampler = sampler if sampler == all_candidates else own.static.sampler
    if not own._compiled_as(self, sampler) or own.parts > self.parts:
      return False
    longest = grammar.longest(request.plan)
    prompts = [len(prompt) - 1 for prompt in request.streams]
    fit = [prompt <= width for prompt, width in zip(prompts, self.static.widths)]
    return all(fit) and all(prompt + longest <= ring for prompt, ring in zip(prompts, self.rings))

  def _compiled_as(self, other: "Kind", sampler: Sampler) -> bool:
    """Returns whether two kinds differ in sizes alone, if this one has another sampler."""
    sizes = {name: getattr(other.static, name) for name in ("widths", "longest", "rooms")}
    streams = len(self.static.widths), len(other.static.widths)
    return self.static._replace(sampler=sampler, **sizes) == other.static and len(set(streams)) == 1


def kind_of(request: Request, sampling: SamplingConfig, generator: Generator) -> Kind:
  """Returns what a request must have in common with a lane; lengths are rounded up."""
  config, usual = generator.config, Sampler.of(generator.config.sampling)
  own = Sampler.of(sampling)

  def candidates(asked: int, compiled: int) -> int:
    return compiled if 0 < asked <= compiled else 0

  sampler = Sampler(
    candidates(own.of_codes, usual.of_codes),
    candidates(own.of_all, usual.of_all),
    own.contrastive_k if len(request.streams) > 1 else 0,
  )
  most = batch_lib.bucket_slots(config.positions)
  # The unconditional prompt is short always, the first of any length: few kinds of both.
  smallest = [batch_lib.BUCKET, *[SHORT] * (len(request.streams) - 1)]
  widths = tuple(
    min(width_bucket(len(prompt) - 1, n), most) for prompt, n in zip(request.streams, smallest)
  )
  longest = grammar.longest(request.plan)
  room = min(room_bucket(longest, config.image_tokens + 1), config.positions)
  static = Static(
    config.model,
    Grammar(config.vocab, config.image_tokens),
    sampler,
    config.cache_dtype,
    widths,
    room,
    (room,),
  )
  return Kind(static, max(4, 1 << len(request.plan).bit_length()))


def largest(own: Kind, config: GeneratorConfig) -> Kind:
  """Returns a kind that takes all prompts, boxes and candidates of the tasks with S streams.

  The first stream may take all positions. The second one has an image, a sentinel for each row of a
  box, and the words of an edit; the third is the short prompt without conditions.

  Args:
    own: `kind_of` a request with S streams.
    config: of the generator.
  """
  image = config.image_tokens
  second = batch_lib.bucket_slots(image + math.isqrt(image) + 2 * batch_lib.BUCKET)
  streams = len(own.static.widths)
  widths = (batch_lib.bucket_slots(config.positions), second, SHORT)[:streams]
  # With one stream, the slots of the prompt hold the positions after it, too.
  room = batch_lib.BUCKET if streams == 1 else image + 1
  sampler = Sampler(0, 0, own.static.sampler.contrastive_k)
  parts = 1 << min(3 * config.vocab.num_masks, config.positions).bit_length()
  static = own.static._replace(sampler=sampler, widths=widths, longest=room, rooms=(room,))
  return Kind(static, max(4, parts))


def width_bucket(length: int, smallest: int = batch_lib.BUCKET) -> int:
  """Returns the number of slots for a prompt: `smallest`, or BUCKET times 1, 2, 3, 4, 6, 8, 12, ...

  >>> [width_bucket(n) for n in (0, 32, 33, 65, 129, 200, 257)]
  [32, 32, 64, 96, 192, 256, 384]
  """
  if length <= smallest:
    return smallest
  units = -(-length // batch_lib.BUCKET)
  power = 1 << (units - 1).bit_length()
  return batch_lib.BUCKET * (power * 3 // 4 if units <= power * 3 // 4 else power)


def room_bucket(length: int, image: int) -> int:
  """Returns the number of slots for the tokens of a sample: those of an image, halved or doubled.

  >>> [room_bucket(n, 65) for n in (1, 33, 34, 65, 66, 131)]
  [33, 33, 65, 65, 130, 260]

  Args:
    length: largest number of tokens.
    image: number of tokens of an image and its end.
  """
  room = image
  while room < length:
    room *= 2
  while (half := -(-room // 2)) >= max(length, batch_lib.BUCKET):
    room = half
  return room
