"""Computes rewards, the scores of generated images that `cm3leon reinforce` increases."""

# B samples.

from collections.abc import Callable, Sequence
import functools

from jaxtyping import Float32
import numpy as np

from cm3leon_jax.config.settings import Settings
from cm3leon_jax.data.instructions.records import Record
from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation import judged as judged_lib
from cm3leon_jax.generation.sample import Sample
from cm3leon_jax.reinforcement.own_rewards import OwnReward

# (records, samples) -> scores. Higher is better.
Reward = Callable[[Sequence[Record], Sequence[Sample]], Float32[np.ndarray, " B"]]


def judged(
  records: Sequence[Record], samples: Sequence[Sample], judge: judged_lib.Judge
) -> Float32[np.ndarray, " B"]:
  """Returns, for each image, 1 if everything in it is correct, and 0 otherwise.

  The share of correct facts would be a bad reward: a policy could raise it by returning the input
  image of an edit, where everything that must stay unchanged is correct.

  Raises:
    UserError: a record has no facts.
  """
  for record in records:
    if not record.facts:
      raise UserError(
        f"config.reinforce.reward is 'judge', but record {record.key} has no field 'facts'."
      )
  images = [sample.segments[0] for sample in samples]
  wrong = judged_lib.judge_all(judge, images, [record.facts for record in records])
  return np.array([not reason for reason in wrong], np.float32)


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


def reward_of(settings: Settings) -> Reward:
  """Returns the function that computes `ReinforceConfig.reward`.

  Raises:
    UserError: the config has no judge, or a function of the user cannot be loaded.
  """
  if settings.reinforce.reward == "clip":
    return clip_scores
  if settings.reinforce.reward != "judge":
    return OwnReward.load(settings.reinforce.reward)
  judge = judged_lib.judge_of(settings)
  if judge is None:
    raise UserError(
      "config.reinforce.reward is 'judge', but config.evaluation.judge names no judge: set it to "
      "FILE.py:FUNCTION, or the reward to 'clip' or to a function of yours."
    )
  return functools.partial(judged, judge=judge)
