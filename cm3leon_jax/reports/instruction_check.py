"""Checks instruction samples against their records: tokens, target and loss weights."""

# T tokens of a sample.

import dataclasses

import numpy as np

from cm3leon_jax.data.documents.store import Document
from cm3leon_jax.data.instructions.samples import InstructionPlan, Instructions
from cm3leon_jax.data.rows.loader import join
from cm3leon_jax.reports import row_parts
from cm3leon_jax.vocab import VocabLayout


@dataclasses.dataclass(frozen=True)
class CheckedTask:
  """Instruction task of a sample, as planned.

  `target` is the half-open range of the target in `</s> segment <break> ... segment </s>`.
  """

  name: str
  target: tuple[int, int]
  plan: InstructionPlan
  instructions: Instructions

  def left_out(self, document: Document) -> list[int]:
    """Returns the indices of the segments that were dropped from the sample."""
    first, skipped = self.plan.first, self.plan.skipped
    return [i for i in range(len(document.segments)) if i < first or i == skipped]


def check_instruction(
  sample: row_parts.RowSample,
  document: Document,
  task: CheckedTask,
  vocab: VocabLayout,
  length: int,
) -> tuple[int, int]:
  """Checks that a sample has its record's tokens and the correct loss weights.

  The sample must not have the dropped segments. Returns the half-open range of the target in the
  sample, found from the tokens of the sample, not from the plan.

  Raises:
    ValueError: tokens, target or loss weights are wrong.
  """
  tokens, where = sample.tokens, f"the sample of task {task.name}, record '{document.key}',"
  left_out = task.left_out(document)
  if row_parts.is_dropped(tokens, vocab) != task.plan.masked:
    raise ValueError(
      f"{where} must {'not ' * (not task.plan.masked)}drop everything before its target."
    )
  kept = tuple(s for i, s in enumerate(document.segments) if i not in left_out)
  row_parts.check_sample(tokens, [dataclasses.replace(document, segments=kept)], vocab, length)
  start, stop = target_range(tokens, task, vocab)
  expected = join([document], vocab)[slice(*task.target)]
  if not np.array_equal(tokens[start:stop], expected):
    raise ValueError(
      f"{where} differs from the target of its record at tokens {start} to {stop - 1}."
    )
  weights = np.zeros(len(tokens), np.float32)
  weights[start : stop + 1] = 1  # `stop` is the <eoss> or </s> after the target.
  if task.instructions.loss_on == "all":
    weights[3 if task.plan.masked else 1 :] = 1
  if not np.array_equal(sample.weights, weights * np.float32(task.instructions.loss_weight)):
    raise ValueError(f"{where} has loss weights that do not fit its target and the config.")
  return start, stop


def target_range(tokens: np.ndarray, task: CheckedTask, vocab: VocabLayout) -> tuple[int, int]:
  """Finds the target in a sample, after its second `<mask:0>` or at its end.

  </s> 7 <mask:0> <break> 91 92 </s> <mask:0> 8 9 <eoss>: (8, 10)
  </s> 7 <break> 91 92 </s>: (3, 5), if the target has two tokens
  """
  stop = len(tokens) - 1
  sentinels = np.flatnonzero(tokens == vocab.mask(0))
  if len(sentinels) > 1:
    return int(sentinels[-1]) + 1, stop
  return stop - (task.target[1] - task.target[0]), stop
