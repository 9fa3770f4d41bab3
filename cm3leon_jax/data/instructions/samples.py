"""Plans and builds the samples of instruction documents, whose target is known.

target inside: </s> Question: how many? Answer: <mask:0>. <break> image </s> <mask:0> two <eoss>
image last:    </s> a cat <break> image </s>
"""

# T tokens of a sample.

from collections.abc import Sequence
import dataclasses
import typing

from etils import epath
import numpy as np
import numpy.typing as npt

from cm3leon_jax.config import UserError
from cm3leon_jax.data.documents.store import Document
from cm3leon_jax.data.instructions.config import LossOn
from cm3leon_jax.data.rows import cm3
from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.runs import stages
from cm3leon_jax.vocab import VocabLayout

TARGETS = "targets.npy"


class Drops(typing.NamedTuple):
  """Shares of samples that lack the instruction, or all that is before the target."""

  instruction: float = 0.0
  all: float = 0.0


@dataclasses.dataclass(frozen=True)
class Instructions:
  """What makes the documents of a store instructions.

  Attributes:
    targets: [n, 2] int32, half-open ranges in `</s> segment <break> ... segment </s>`.
    drops: shares of samples that lack something.
    loss_on: which tokens have a weight.
    loss_weight: the weight.
  """

  targets: np.ndarray
  drops: Drops = Drops()  # noqa: RUF009 (immutable)
  loss_on: LossOn = "all"
  loss_weight: float = 1.0


def write_targets(folder: epath.PathLike, targets: npt.ArrayLike) -> None:
  """Writes the targets of a store beside its documents."""
  with replacing(epath.Path(folder) / TARGETS) as file:
    np.save(file, np.asarray(targets, np.int32).reshape(-1, 2))


def read_targets(folder: epath.PathLike, count: int) -> np.ndarray:
  """Reads the targets of a store of `count` documents.

  Raises:
    UserError: there are none, or of another number of documents.
  """
  path = epath.Path(folder) / TARGETS
  if not path.exists():
    raise UserError(f"{path} does not exist: the documents in {folder} are no instructions.")
  stages.check_files(path)
  with path.open("rb") as file:
    targets = np.load(file)
  if len(targets) != count:
    raise UserError(f"{path} has {len(targets)} targets for {count} documents: write both again.")
  return targets


class InstructionPlan(typing.NamedTuple):
  """Plan of the sample of one instruction document.

  Attributes:
    first: segments before this one are left out...
    skipped: ...as well as this one, -1: none.
    masked: whether `<mask:0>` stands for the segments that are left out.
    spans: the target as a CM3 span, or () if it is the last image.
    target: half-open range of the target in the joined sample without what is left out.
    length: tokens of the sample.
    neighbors, missing, crowded_out, dropped: as in `SamplePlan`; instructions have no neighbors.
  """

  first: int
  skipped: int
  masked: bool
  spans: tuple[tuple[int, int], ...]
  target: tuple[int, int]
  length: int
  neighbors: tuple[int, ...] = ()
  missing: int = 0
  crowded_out: int = 0
  dropped: bool = False


def plan_instruction(
  lengths: Sequence[int],
  is_image: Sequence[bool],
  target: tuple[int, int],
  rng: np.random.Generator,
  drops: Drops,
) -> InstructionPlan:
  """Chooses what a sample lacks.

    lengths = [2, 16, 3, 16], target = (25, 41), the last segment, an image
    complete:            all four segments
    without instruction: the first, the second and the fourth
    without all:         </s> <mask:0> <break> fourth </s>

  An image that is the last segment is predicted in its place, as images of captions are; any other
  target is a span that is infilled. Only samples of the former kind can lack something: a masked
  answer would stand alone. The instruction is the segment before the target.

  Args:
    lengths: of the segments, without `<break>` and `</s>`.
    is_image: of the segments.
    target: half-open range in `</s> segment <break> ... segment </s>`.
    rng: generator of the sample, at its start.
    drops: shares.
  """
  starts = np.cumsum([1, *(int(n) + 1 for n in lengths)])
  last, total = len(lengths) - 1, int(starts[-1])
  is_last = is_image[last] and tuple(target) == (int(starts[last]), total - 1)
  draw = rng.random()
  if is_last and last and draw < drops.all:
    size = int(lengths[-1])
    return InstructionPlan(last, -1, True, (), (3, 3 + size), size + 4)
  if is_last and last and draw < drops.all + drops.instruction:
    gone = int(lengths[last - 1]) + 1
    moved = (target[0] - gone, target[1] - gone)
    return InstructionPlan(0, last - 1, False, (), moved, total - gone)
  target = (int(target[0]), int(target[1]))
  if is_last:
    return InstructionPlan(0, -1, False, (), target, total)
  return InstructionPlan(0, -1, False, (target,), target, total + cm3.OVERHEAD)


def build_instruction(
  document: Document,
  plan: InstructionPlan,
  vocab: VocabLayout,
  loss_on: LossOn,
  loss_weight: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
  """Builds the sample of a plan.

  Args:
    document: its segments.
    plan: of `plan_instruction`.
    vocab: names the special tokens.
    loss_on: "all": every token but the first has the weight (the paper); "target": the target, and
      the token that ends it.
    loss_weight: the weight.

  Returns:
    Tokens [T] int32, and their weights as targets [T] float32.

  Raises:
    ValueError: the length is not the planned one, because the store changed after planning.
  """
  kept = [
    s.tokens for i, s in enumerate(document.segments) if i >= plan.first and i != plan.skipped
  ]
  parts: list = [[vocab.eos]]
  if plan.masked:
    parts += [[vocab.mask(0)], [vocab.brk]]
  for tokens in kept:
    parts += [tokens, [vocab.brk]]
  joined = np.concatenate([*parts[:-1], [vocab.eos]]).astype(np.int32)
  tokens = cm3.apply_cm3_mask(joined, plan.spans, vocab)
  if len(tokens) != plan.length:
    raise ValueError(
      f"document '{document.key}' gives a sample of {len(tokens)} tokens, planned were "
      f"{plan.length}: the store changed after planning; start the run again."
    )
  weights = np.full(len(tokens), loss_weight, np.float32)
  weights[0] = 0
  if plan.masked:
    weights[:3] = 0
  if loss_on == "target":
    start, stop = plan.target
    if plan.spans:  # Moved to the end, with <eoss> after it.
      start, stop = len(tokens) - 1 - (stop - start), len(tokens) - 1
    weights[:] = 0
    weights[start : stop + 1] = loss_weight
  return tokens, weights
