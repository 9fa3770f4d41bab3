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
from cm3leon_jax.reinforcement.own_rewards import OwnReward
from cm3leon_jax.settings import Settings

# (records, samples) -> scores. Higher is better.
Reward = Callable[[Sequence[Record], Sequence[Sample]], Float32[np.ndarray, " B"]]


def judged(
  records: Sequence[Record], samples: Sequence[Sample], world: World, settings: Settings
) -> Float32[np.ndarray, " B"]:
  """Returns, for each image, 1 if everything in it is correct, and 0 otherwise.

  The share of correct facts would be a bad reward: a policy could raise it by returning the input
  image of an edit, where everything that must stay unchanged is correct.
  """
  images = np.stack([sample.segments[0] for sample in samples])
  answers = world.judge_answer_images(records, images, settings)
  return np.array([answer.right for answer in answers], np.float32)


def clip_scores(records: Sequence[Record], samples: Sequence[Sample]) -> Float32[np.ndarray, " B"]:
  """Returns, for each image, the cosine similarity of its CLIP embedding and its caption's.

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
  """Returns the function that computes `ReinforceConfig.reward`. All tasks must be of one world.

  Raises:
    UserError: the reward cannot score a task, or `OwnReward.load` raises the error.
  """
  if settings.reinforce.reward == "clip":
    return clip_scores
  if settings.reinforce.reward != "judge":
    return OwnReward.load(settings.reinforce.reward)
  judges = []
  for task in tasks:
    if (world := of_answers(task)) is None:
      raise UserError(
        f"config.reinforce.reward is 'judge', but task {task.name} has the format {task.format}: "
        "only tasks over scenes can be judged; 'clip' scores images for captions, and "
        "FILE.py:FUNCTION names a function of yours."
      )
    judges.append(world)
  return functools.partial(judged, world=judges[0], settings=settings)
