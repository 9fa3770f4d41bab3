"""The random sequence of each sample, and the random order of a pass over a source."""

# n samples. Arguments `rows` are distinct indices of samples, [m] int64.

from collections.abc import Sequence
import math
import threading
from typing import Any

from grain.experimental import index_shuffle
import numpy as np

ROUNDS = 10
FEW = 4_096  # Below this size, `shuffled` repeats its cipher too often for arrays to be faster.
BLOCKS = 2  # Number of blocks that are computed at a time.
MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
KEY_STEPS = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
HALF, LOW = np.uint64(32), np.uint64(2**32 - 1)
MAX_MEAN = 10.0  # From this mean on, numpy samples from a Poisson distribution in another way.


class SampleGenerators(threading.local):
  """Reuses one generator per thread. A new generator per sample would be ten times slower."""

  def __init__(self) -> None:
    self._philox = np.random.Philox(0)
    self._generator = np.random.Generator(self._philox)
    self._state: Any = self._philox.state  # Any: the type stub rejects a tuple as the counter.

  def at(self, key: np.ndarray, unit: int, number: int = 0) -> np.random.Generator:
    """Returns a generator at the start of the random sequence (key, unit, number).

    The generator is valid until the next call in this thread. Philox is a function of a key, [2]
    uint64, and a counter (Salmon et al. 2011). Random sequences never overlap if the high
    words of their counters differ.
    """
    self._state["state"] = {"key": key, "counter": (0, 0, unit, number)}
    self._philox.state = self._state
    return self._generator


def pass_seeds(seed: int, source: int, pass_: int) -> tuple[np.ndarray, int]:
  """Computes the random key of a pass, [2] uint64, and the seed for the order of its units."""
  words = np.random.SeedSequence((seed, source, pass_)).generate_state(3, np.uint64)
  return words[:2], int(words[2]) % 2**32


def _multiply(a: np.ndarray, by: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the high and the low words of the products of 64-bit words."""
  high, low = np.uint64(by >> 32), np.uint64(by) & LOW
  a_high, a_low = a >> HALF, a & LOW
  cross, other = a_low * high, a_high * low
  carry = (a_low * low >> HALF) + (cross & LOW) + (other & LOW)
  return a_high * high + (cross >> HALF) + (other >> HALF) + (carry >> HALF), a * np.uint64(by)


def philox(key: Sequence[np.ndarray], blocks: np.ndarray, units: np.ndarray) -> np.ndarray:
  """Computes blocks of Philox4x64-10 (Salmon et al. 2011) with the counters (block, 0, unit, 0).

  The arguments are uint64 and broadcast: two words of the key, and the counters. Returns the words
  of the blocks, uint64, along a new last dimension of 4.
  """
  zeros = np.zeros_like(units)
  a, b, c, d = blocks, zeros, units, zeros
  for _ in range(ROUNDS):
    (high, low), (other_high, other_low) = (
      _multiply(a, MULTIPLIERS[0]),
      _multiply(c, MULTIPLIERS[1]),
    )
    a, b, c, d = other_high ^ b ^ key[0], other_low, high ^ d ^ key[1], low
    key = [k + np.uint64(step) for k, step in zip(key, KEY_STEPS)]
  return np.stack(np.broadcast_arrays(a, b, c, d), axis=-1)


def _round_keys(seed: int) -> list[int]:
  """Returns the four 32-bit numbers that `std::seed_seq` of C++ generates from one seed."""
  words, previous = [0x8B8B8B8B] * 4, [1, seed, 0, 0]

  def mix(x: int) -> int:
    return (x ^ x >> 27) % 2**32

  for k in range(4):
    step = 1_664_525 * mix(words[k] ^ words[(k + 1) % 4] ^ words[k - 1])
    last = step + previous[k] + k
    words[(k + 1) % 4] = (words[(k + 1) % 4] + step) % 2**32
    words[(k + 2) % 4] = (words[(k + 2) % 4] + last) % 2**32
    words[k] = last % 2**32
  for k in range(4):
    step = 1_566_083_941 * mix((words[k] + words[(k + 1) % 4] + words[k - 1]) % 2**32)
    words[(k + 1) % 4] = (words[(k + 1) % 4] ^ step) % 2**32
    words[(k + 2) % 4] = (words[(k + 2) % 4] ^ (step - k)) % 2**32
    words[k] = (step - k) % 2**32
  return words


def shuffled(places: np.ndarray, size: int, seed: int) -> np.ndarray:
  """Returns which of `size` units stand at places [m] of a random order, [m] int64.

  The same as `grain.experimental.index_shuffle` with 4 rounds for each place, which takes 3 us a
  place: a block cipher (Simon, Beaulieu et al. 2013), repeated until its result is below `size`.
  """
  most = size - 1
  if size < FEW:
    return np.array([index_shuffle(i, most, seed, 4) for i in places.tolist()], np.int64)
  bits = max(16, math.ceil(math.log2(most))) + 1 >> 1
  word = np.uint64(2**bits - 1)
  keys = [np.uint64(key) & word for key in _round_keys(seed)]

  def turned(x: np.ndarray, by: int) -> np.ndarray:
    return (x << np.uint64(by) | x >> np.uint64(bits - by)) & word

  def scrambled(x: np.ndarray) -> np.ndarray:
    return turned(x, 1) & turned(x, 8) ^ turned(x, 2)

  # A fault of grain that is kept, because it decides rows: of 4**bits + 1 units, one comes twice
  # (at place 0 and at the last place) and one never.
  result = places.astype(np.uint64) % np.uint64(4**bits)
  left = np.arange(len(places))
  while len(left):
    high, low = result[left] >> np.uint64(bits), result[left] & word
    for i in (0, 2):
      high = high ^ scrambled(low) ^ keys[i]
      low = low ^ scrambled(high) ^ keys[i + 1]
    result[left] = high << np.uint64(bits) | low
    left = left[result[left] > most]
  return result.astype(np.int64)


class RandomStreams:
  """Draws what the generators of `SampleGenerators.at` draw, for n samples at number 0."""

  def __init__(self, keys: np.ndarray, units: np.ndarray):
    """Starts the sequences of the units [n] with the keys [n, 2] uint64."""
    self._keys, self._units = keys, units.astype(np.uint64)
    # numpy counts before it computes a block.
    self._next_block = np.ones(len(units), np.uint64)
    self._words = np.zeros((len(units), 4 * BLOCKS), np.uint64)
    self._used = np.full(len(units), 4 * BLOCKS)
    # A 32-bit number takes half of a word; the other half waits for the next one.
    self._half, self._has_half = np.zeros(len(units), np.uint64), np.zeros(len(units), bool)

  def _next(self, rows: np.ndarray) -> np.ndarray:
    used = self._used[rows]
    empty = rows[used == 4 * BLOCKS]
    if len(empty):
      blocks = self._next_block[empty][:, None] + np.arange(BLOCKS, dtype=np.uint64)
      key = [self._keys[empty, i][:, None] for i in range(2)]
      words = philox(key, blocks, self._units[empty][:, None])
      self._words[empty] = words.reshape(len(empty), 4 * BLOCKS)
      self._next_block[empty] += np.uint64(BLOCKS)
      used[used == 4 * BLOCKS] = 0
    self._used[rows] = used + 1
    return self._words[rows, used]

  def random(self, rows: np.ndarray) -> np.ndarray:
    """Draws a float64 in [0, 1) for each row."""
    return (self._next(rows) >> np.uint64(11)) * 2.0**-53

  def _next_half(self, rows: np.ndarray) -> np.ndarray:
    waiting = self._has_half[rows]
    new = rows[~waiting]
    words = self._next(new)
    result = self._half[rows]
    result[~waiting] = words & LOW
    self._half[new] = words >> HALF
    self._has_half[rows] = ~waiting
    return result

  def integers(self, rows: np.ndarray, most: int) -> np.ndarray:
    """Draws an int64 in {0, ..., most} for each row (Lemire 2019); `most` is below 2**32 - 1."""
    result, count = np.zeros(len(rows), np.int64), np.uint64(most + 1)
    left = np.arange(len(rows) if most else 0)
    while len(left):
      product = self._next_half(rows[left]) * count
      accepted = (product & LOW) >= np.uint64(2**32 % (most + 1))
      result[left[accepted]] = product[accepted] >> HALF
      left = left[~accepted]
    return result

  def permutations(self, rows: np.ndarray, counts: np.ndarray, width: int) -> np.ndarray:
    """Shuffles 0 ... count - 1 for each row. Returns [m, width]; the remaining columns ascend."""
    result = np.tile(np.arange(width), (len(rows), 1))
    for last in range(width - 1, 0, -1):
      left, mask = np.flatnonzero(counts > last), np.uint64(2 ** last.bit_length() - 1)
      while len(left):
        other = (self._next_half(rows[left]) & mask).astype(np.int64)
        at, other = left[other <= last], other[other <= last]
        result[at, last], result[at, other] = result[at, other], result[at, last]
        left = np.setdiff1d(left, at, assume_unique=True)
    return result

  def poisson(self, rows: np.ndarray, mean: float) -> np.ndarray:
    """Draws an int64 from a Poisson distribution of a mean below `MAX_MEAN` for each row."""
    result, product = np.zeros(len(rows), np.int64), np.ones(len(rows))
    left = np.arange(len(rows) if mean else 0)
    while len(left):
      product[left] *= self.random(rows[left])
      left = left[product[left] > math.exp(-mean)]
      result[left] += 1
    return result
