"""Kinds of lanes: what requests must have in common to share one, lengths rounded up to buckets."""

# M parts of a plan.

from typing import NamedTuple

from cm3leon_jax.decoding import batch as batch_lib
from cm3leon_jax.decoding import grammar
from cm3leon_jax.decoding.compile import Static
from cm3leon_jax.decoding.generator import Generator
from cm3leon_jax.decoding.grammar import Grammar
from cm3leon_jax.decoding.request import Request
from cm3leon_jax.decoding.sampling import Sampler, SamplingConfig

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
  def slots(self) -> int:
    """Number of cache slots of a row, over all streams."""
    return sum(width + self.static.longest for width in self.static.widths)

  def fits(self, lane: "Kind") -> bool:
    """Returns whether a request of this kind may join a lane of another, of at most 3 x its slots.

    Attention reads all slots of a lane, but a step of each lane reads all weights.
    """
    sizes = ("widths", "longest", "rooms")
    own = self.static._replace(**{name: getattr(lane.static, name) for name in sizes})
    if own != lane.static or len(self.static.widths) != len(lane.static.widths):
      return False
    larger = [b >= a for a, b in zip(self.static.widths, lane.static.widths)]
    larger += [lane.static.longest >= self.static.longest, lane.parts >= self.parts]
    return all(larger) and lane.slots <= 3 * self.slots


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
