"""Plans and builds training samples from instruction documents, which mark their targets.

target text:  </s> Question: how many? Answer: <mask:0>. <break> image </s> <mask:0> two <eoss>
target image: </s> a cat <break> image </s>
"""

# T tokens of a sample.

from collections.abc import Sequence
import dataclasses
import typing

from etils import epath
import numpy as np
import numpy.typing as npt

from cm3leon_jax import templates
from cm3leon_jax.config.instructions import LossOn
from cm3leon_jax.data.documents.store import Document
from cm3leon_jax.data.rows import cm3
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.stages import stages
from cm3leon_jax.vocab import VocabLayout

TARGETS = "targets.npy"


class Drops(typing.NamedTuple):
  """Shares of samples that omit the instruction, or everything before the target."""

  instruction: float = 0.0
  all: float = 0.0


@dataclasses.dataclass(frozen=True)
class Instructions:
  """Targets, drops and loss weights of the instruction documents of one store.

  Attributes:
    targets: [n, 2] int32, the half-open range of the target of each document in
      `</s> segment <break> ... segment </s>`.
    loss_on: which tokens have a loss: "all" tokens, or only the "target".
  """

  targets: np.ndarray
  drops: Drops = Drops()  # noqa: RUF009 (immutable)
  loss_on: LossOn = "all"
  loss_weight: float = 1.0


def write_targets(folder: epath.PathLike, targets: npt.ArrayLike) -> None:
  """Writes the targets of a store into its folder."""
  with replacing(epath.Path(folder) / TARGETS) as file:
    np.save(file, np.asarray(targets, np.int32).reshape(-1, 2))


def read_targets(folder: epath.PathLike, count: int) -> np.ndarray:
  """Reads the targets of a store of `count` documents.

  Raises:
    UserError: the file is missing, or its number of targets is not `count`.
  """
  path = epath.Path(folder) / TARGETS
  if not path.exists():
    raise UserError(
      f"{path} does not exist, so the documents in {folder} are not instruction-tuning data."
    )
  stages.check_files(path)
  with path.open("rb") as file:
    targets = np.load(file)
  if len(targets) != count:
    raise UserError(f"{path} has {len(targets)} targets for {count} documents: write both again.")
  return targets


class InstructionPlan(typing.NamedTuple):
  """Plan of the sample of one instruction document.

  Attributes:
    first: index of the first segment that the sample keeps.
    skipped: indices of later segments that the sample omits.
    masked: whether the segments before `first` are dropped; `<mask:0>` replaces them.
    spans: the target as a CM3 span, or () if the target is the last image.
    target: half-open range of the target in the joined sample, without the omitted segments.
    neighbors, missing, crowded_out, dropped: as in `SamplePlan`. Instructions have no neighbors.
  """

  first: int
  skipped: tuple[int, ...]
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
  vocab: VocabLayout,
) -> InstructionPlan:
  """Chooses at random which segments a sample omits.

    lengths = [2, 16, 3, 16], target = (25, 41): the target is the last segment, an image
    complete:                             all four segments
    without the instruction:              the first, the second and the fourth segment
    without everything before the target: </s> <mask:0> <break> fourth segment </s>

  A target image that is the last segment is predicted in its place, like the image of a caption.
  Any other target becomes a CM3 span that the model infills. Samples omit segments only before such
  an image, because a span would have no context left. The instruction is the last text before the
  image. With a template that `drops_texts`, all texts before the image are omitted with it.

  Args:
    lengths: lengths of the segments.
    target: half-open range in `</s> segment <break> ... segment </s>`, for any template.
    rng: new generator for the sample, from which no number was drawn.
  """
  template, starts = templates.of(vocab), np.cumsum([1, *(int(n) + 1 for n in lengths)])
  last, size = len(lengths) - 1, int(lengths[-1])
  is_last = is_image[last] and tuple(target) == (int(starts[last]), int(starts[-1]) - 1)
  draw = rng.random()
  if is_last and last and draw < drops.all:
    length = template.dropped_length(size)
    return InstructionPlan(last, (), True, (), (length - 1 - size, length - 1), length)
  skipped: tuple[int, ...] = ()
  if is_last and draw < drops.all + drops.instruction:
    texts = tuple(i for i in range(last) if not is_image[i])
    skipped = texts if template.drops_texts else texts[-1:]
  kept = [i for i in range(last + 1) if i not in skipped]
  joined = [([int(lengths[i]) for i in kept], [is_image[i] for i in kept])]
  within = int(starts.searchsorted(target[0], side="right")) - 1
  start = template.bounds(joined)[kept.index(within)][0] + int(target[0] - starts[within])
  at, total = (start, start + int(target[1] - target[0])), template.length(joined)
  if is_last:
    return InstructionPlan(0, skipped, False, (), at, total)
  return InstructionPlan(0, (), False, (at,), at, total + cm3.OVERHEAD)


def instruction_weights(
  plan: InstructionPlan, loss_on: LossOn, loss_weight: float = 1.0
) -> np.ndarray:
  """Computes the loss weight of predicting each token of a sample, [T] float32.

  With `loss_on` = "all", every token except the first has the weight `loss_weight`, as in the
  paper. With "target", only the target and the token after it have this weight.
  """
  weights = np.zeros(plan.length, np.float32)
  if loss_on == "all":
    weights[plan.target[0] if plan.masked else 1 :] = loss_weight
    return weights
  start, stop = plan.target
  if plan.spans:  # The target is at the end, and <eoss> follows it.
    start, stop = plan.length - 1 - (stop - start), plan.length - 1
  weights[start : stop + 1] = loss_weight
  return weights


def build_instruction(
  document: Document,
  plan: InstructionPlan,
  vocab: VocabLayout,
  loss_on: LossOn,
  loss_weight: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
  """Builds the sample that `plan` describes.

  Returns the tokens, [T] int32, and their `instruction_weights`, [T] float32.

  Raises:
    ValueError: the length differs from the plan, because the store changed after planning.
  """
  template = templates.of(vocab)
  absent = template.absent if plan.masked else ()
  kept = [s for i, s in enumerate(document.segments) if i >= plan.first and i not in plan.skipped]
  kinds = [*[False] * len(absent), *(segment.is_image for segment in kept)]
  joined = template.join([*absent, *(segment.tokens for segment in kept)], kinds)
  tokens = cm3.apply_cm3_mask(joined, plan.spans, vocab)
  if len(tokens) != plan.length:
    raise ValueError(
      f"document '{document.key}' gives a sample of {len(tokens)} tokens, but the plan has "
      f"{plan.length}: the store changed after planning; start the run again."
    )
  return tokens, instruction_weights(plan, loss_on, loss_weight)
