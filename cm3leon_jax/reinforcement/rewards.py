"""Rewards: scores of generated images, which `cm3leon reinforce` raises."""

# B samples.

from collections.abc import Callable, Sequence
import functools

from jaxtyping import Float32
import numpy as np

from cm3leon_jax.config import UserError
from cm3leon_jax.data.instructions.config import InstructionTask
from cm3leon_jax.data.instructions.records import Record
from cm3leon_jax.generation.sample import Sample
from cm3leon_jax.scenes.config import Style
from cm3leon_jax.scenes.judge import answers
from cm3leon_jax.scenes.judge.instruction_grades import is_judged

# (what was asked, samples) -> scores; higher is better.
Reward = Callable[[Sequence[Record], Sequence[Sample]], Float32[np.ndarray, " B"]]


def judged(
  records: Sequence[Record], samples: Sequence[Sample], style: Style = "filled"
) -> Float32[np.ndarray, " B"]:
  """Returns 1 for each image that is wholly right, and 0 for the others.

  A share of facts can be raised by doing nothing: an image returned unchanged keeps all that an
  edit must not touch.
  """
  images = np.stack([sample.segments[0] for sample in samples])
  verdicts = answers.judge_images(records, images, style)
  return np.array([verdict.correct for verdict in verdicts], np.float32)


def clip_scores(records: Sequence[Record], samples: Sequence[Sample]) -> Float32[np.ndarray, " B"]:
  """Returns the cosines of images and captions.

  Raises:
    UserError: a sample has none: its prompt is more than a caption.
  """
  for record, sample in zip(records, samples, strict=True):
    if sample.clip_score is None:
      raise UserError(
        f"config.reinforce.reward is 'clip', and CLIP cannot score {record.key}: it scores tasks "
        "whose prompt is a caption alone."
      )
  return np.array([sample.clip_score for sample in samples], np.float32)


def reward_of(kind: str, tasks: Sequence[InstructionTask], style: Style = "filled") -> Reward:
  """Returns the reward of a kind, see `ReinforceConfig.reward`; `style` is that of the scenes.

  Raises:
    UserError: it cannot score a task.
  """
  if kind == "clip":
    return clip_scores
  for task in tasks:
    if not is_judged(task):
      raise UserError(
        f"config.reinforce.reward is 'judge', and task {task.name} has the format {task.format}: "
        "only tasks over scenes are judged; 'clip' scores images for captions."
      )
  return functools.partial(judged, style=style)
