"""Computes rewards, the scores of generated images that `cm3leon reinforce` increases."""

# B samples.

from collections.abc import Callable, Sequence
import functools

from jaxtyping import Float32
import numpy as np

from cm3leon_jax.config import UserError
from cm3leon_jax.data.instructions.config import InstructionTask
from cm3leon_jax.data.instructions.records import Record
from cm3leon_jax.evaluation.world import World, of_answers
from cm3leon_jax.generation.sample import Sample
from cm3leon_jax.settings import Settings

# (records, samples) -> scores. Higher is better.
Reward = Callable[[Sequence[Record], Sequence[Sample]], Float32[np.ndarray, " B"]]


def judged(
  records: Sequence[Record], samples: Sequence[Sample], world: World, settings: Settings
) -> Float32[np.ndarray, " B"]:
  """Returns 1 for each image that is wholly right, and 0 for the others.

  The reward is not the share of right facts, because a policy can raise this share by doing
  nothing. In an unchanged image, everything that an edit must not change is right.
  """
  images = np.stack([sample.segments[0] for sample in samples])
  answers = world.judge_answer_images(records, images, settings)
  return np.array([answer.right for answer in answers], np.float32)


def clip_scores(records: Sequence[Record], samples: Sequence[Sample]) -> Float32[np.ndarray, " B"]:
  """Returns the cosine similarity of CLIP's embeddings of each image and its caption.

  Raises:
    UserError: a sample has no CLIP score, because its prompt is more than a caption.
  """
  for record, sample in zip(records, samples, strict=True):
    if sample.clip_score is None:
      raise UserError(
        f"config.reinforce.reward is 'clip', but CLIP cannot score {record.key}: it scores only "
        "tasks whose prompt is just a caption."
      )
  return np.array([sample.clip_score for sample in samples], np.float32)


def reward_of(settings: Settings, tasks: Sequence[InstructionTask]) -> Reward:
  """Returns the function that computes `ReinforceConfig.reward`, for tasks of one world.

  Raises:
    UserError: the reward cannot score a task.
  """
  if settings.reinforce.reward == "clip":
    return clip_scores
  judges = []
  for task in tasks:
    if (world := of_answers(task)) is None:
      raise UserError(
        f"config.reinforce.reward is 'judge', but task {task.name} has the format {task.format}: "
        "only tasks over scenes can be judged; 'clip' scores images for captions."
      )
    judges.append(world)
  return functools.partial(judged, world=judges[0], settings=settings)
