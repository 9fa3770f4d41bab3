"""Fits power laws of held-out bits over training FLOPs; compares FLOPs that reach equal bits."""

# P sizes of decoders, R resamples, S seeds, n documents.

import dataclasses
import math

import numpy as np

LEVEL = 0.95
NUM_RESAMPLES = 1_000
LEAST_SIZES = 3  # Minimum number of sizes for a law; with a floor, one more.
FLOOR_STEPS = 200
FLOOR_GAIN = 0.005  # Minimum relative gain in the prediction of the largest size.


@dataclasses.dataclass(frozen=True)
class Law:
  """Describes power laws: bits = floor + scale x (FLOPs / reference) ^ -exponent.

    floor 1, scale 4, exponent 0.5, reference 100: 5 bits at 100 FLOPs, 3 bits at 400 FLOPs

  Attributes:
    reference: FLOPs at which bits = floor + scale.
    floor, scale, exponent: arrays of the same shape [...], with an element per law. If the exponent
      is negative, bits increase with FLOPs.
  """

  reference: float
  floor: np.ndarray
  scale: np.ndarray
  exponent: np.ndarray

  def bits(self, flops) -> np.ndarray:
    """Computes the bits of decoders trained with `flops` FLOPs."""
    return self.floor + self.scale * (np.asarray(flops) / self.reference) ** -self.exponent

  def flops(self, bits) -> np.ndarray:
    """Computes the FLOPs that reach `bits`.

    The result is inf if the law never reaches `bits`. A law whose bits do not decrease is treated
    as constant, with its value at the reference: the result is 0 if this value is at most `bits`,
    else inf.
    """
    above = np.asarray(bits, np.float64) - self.floor
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
      falling = self.reference * (above / self.scale) ** (-1 / self.exponent)
    falling = np.where(above > 0, falling, np.inf)
    return np.where(self.exponent > 0, falling, np.where(above < self.scale, np.inf, 0.0))


def _line(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Fits y [..., P] = a + b x by least squares, where x [P] has mean 0; returns a and b."""
  return y.mean(-1), y @ x / (x @ x)


def fit(flops, bits, with_floor: bool = False) -> Law:
  """Fits power laws by least squares in log bits.

  Without a floor, the law is a line in log bits and log FLOPs. With a floor, the fit searches a
  grid of floors, which is refined three times. For each floor, it fits a line in log(bits - floor).
  The best floor has the smallest squared error in log bits. The grid includes a floor of 0.

  Args:
    flops: [P] training FLOPs of each size.
    bits: [..., P] held-out bits of each size, for one or many laws.
    with_floor: whether to fit a floor.

  Returns:
    A `Law` whose arrays have the shape [...].
  """
  logs, y = np.log(np.asarray(flops, np.float64)), np.asarray(bits, np.float64)
  reference = float(np.exp(logs.mean()))
  x = logs - logs.mean()
  if not with_floor:
    a, b = _line(x, np.log(y))
    return Law(reference, np.zeros_like(a), np.exp(a), -b)
  least = y.min(-1)
  low, high = np.zeros_like(least), 0.999 * least
  for _ in range(4):
    floors = np.linspace(low, high, FLOOR_STEPS)  # [steps, ...]
    a, b = _line(x, np.log(y - floors[..., None]))
    errors = np.log(floors[..., None] + np.exp(a[..., None] + b[..., None] * x)) - np.log(y)
    best = (errors**2).sum(-1).argmin(0)[None]
    floor, a, b = (np.take_along_axis(v, best, 0)[0] for v in (floors, a, b))
    step = (high - low) / (FLOOR_STEPS - 1)
    low, high = np.maximum(floor - step, 0), np.minimum(floor + step, 0.999 * least)
  return Law(reference, floor, np.exp(a), -b)


def needs_floor(flops, bits) -> bool:
  """Returns whether a law with a floor clearly predicts the largest size better from the others.

  `FLOOR_GAIN` defines "clearly". A law with a floor has three parameters, which fit any three sizes
  exactly, so the result is False for three sizes. It is also False if bits increase with FLOPs.

  Args:
    flops: [P] training FLOPs of each size, ascending.
    bits: [P] held-out bits of each size.
  """
  flops, bits = np.asarray(flops), np.asarray(bits)
  if len(flops) <= LEAST_SIZES or fit(flops, bits).exponent <= 0:
    return False
  without, with_floor = (
    abs(math.log(fit(flops[:-1], bits[:-1], floor).bits(flops[-1]) / bits[-1]))
    for floor in (False, True)
  )
  return bool(without - with_floor > FLOOR_GAIN)


def resampled_means(values: list[np.ndarray], groups, rng: np.random.Generator, count: int):
  """Resamples groups of documents (the same for all sizes) and the seeds of each size.

  Args:
    values: for each size, an array [S, n]; sizes may have different numbers of seeds S.
    groups: [n] name of each document's group; documents of a group are resampled together.
    rng: random generator.
    count: R, the number of resamples.

  Returns:
    [R, P] means over the resampled documents and seeds.
  """
  _, places = np.unique(np.asarray(groups), return_inverse=True)
  number = places.max() + 1
  times = rng.multinomial(number, np.full(number, 1 / number), count)[:, places]  # [R, n]
  columns = []
  for of_size in values:
    means = times @ np.asarray(of_size, np.float64).T / times.sum(1, keepdims=True)  # [R, S]
    taken = rng.integers(means.shape[1], size=means.shape)
    columns.append(np.take_along_axis(means, taken, 1).mean(1))
  return np.stack(columns, -1)


def interval(values: np.ndarray) -> tuple[float, float]:
  """Returns the bounds of the central 95% of the resampled values; a bound may be infinite."""
  tail = (1 - LEVEL) / 2
  low, high = np.quantile(values, (tail, 1 - tail), method="inverted_cdf")
  return float(low), float(high)


def ratio(without: Law, neighbors: Law, measured: tuple[float, float], of: str) -> dict:
  """Compares the FLOPs that each condition needs to reach the best bits of one condition.

  The ratio is FLOPs without retrieval / FLOPs with retrieval, so retrieval saves compute if the
  ratio is above 1. If bits decrease with FLOPs, the best bits are the value of the law at the upper
  end of the measured range. If bits increase, they are the value at the lower end, but the ratio
  still uses the FLOPs of the upper end.

  Args:
    without: one or many laws without retrieval.
    neighbors: the same number of laws with retrieval.
    measured: smallest and largest FLOPs of the runs.
    of: condition whose best bits must be reached, "without" or "neighbors".

  Returns:
    A dict of arrays: "bits", "flops_without", "flops_neighbors" and "ratio".
  """
  own = without if of == "without" else neighbors
  level = np.minimum(own.bits(measured[0]), own.bits(measured[1]))
  spent = np.full(np.shape(level), measured[1])
  needed = (neighbors if of == "without" else without).flops(level)
  both = (spent, needed) if of == "without" else (needed, spent)
  with np.errstate(divide="ignore"):
    return {
      "bits": level,
      "flops_without": both[0],
      "flops_neighbors": both[1],
      "ratio": both[0] / both[1],
    }


def bound(needed: float, measured: tuple[float, float]) -> str | None:
  """Returns "below" or "above" if `needed` FLOPs are outside the measured range, else None."""
  if measured[0] <= needed <= measured[1]:
    return None
  return "below" if needed < measured[0] else "above"
