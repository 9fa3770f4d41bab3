import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.clip.model import CLIP
from cm3leon_jax.data.instructions.stores import square_pixels
from cm3leon_jax.errors import UserError
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.reinforcement import rewards, rollouts
from cm3leon_jax.reinforcement.prompts import read_heldout, read_prompts
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from cm3leon_jax.training.step import grpo
from cm3leon_jax.training.step.optimizer import create_optimizer
from cm3leon_jax.training.step.state import TrainState
from tests.generation.run import clip_params, one_device
from tests.models.tiny import random_params
from tests.refusals import refused
from tests.reinforcement.conftest import BATCH, GROUP, NAMES, SETTINGS, settings_of


def judged(records, samples):
  """Scores samples with the judge, for the tasks in `settings_of`."""
  settings = settings_of()
  return rewards.reward_of(settings)(records, samples)


def low_codes(records, samples):
  """Reward that no model was trained for: the share of codes below 16, of 64."""
  assert len(records) == len(samples)
  return np.array([np.mean(sample.codes[0] < 16) for sample in samples], np.float32)


@pytest.fixture(scope="module")
def objective(workdir, layout):
  settings, run = settings_of(), workdir
  with one_device():
    parts = {"layout": layout, "image_tokenizer": ImageTokenizer.load(run / "vqgan")}
    pipeline_of = functools.partial(Pipeline, settings=settings, batch_size=BATCH, **parts)
    prompts = read_prompts(settings, layout, 16)
    reference = random_params(settings.model)
    yield rollouts.Rollouts(settings, prompts, pipeline_of, low_codes, reference)


def test_a_judge_needs_its_function_and_records_with_facts(layout):
  settings = settings_of(reward="judge")
  [prompt] = read_prompts(settings, layout, 1)
  record = dataclasses.replace(prompt.record, facts={})
  with refused(UserError, "config.reinforce.reward", record.key, "facts"):
    rewards.reward_of(settings)([record], [None])
  evaluation = dataclasses.replace(settings.evaluation, judge="")
  with refused(UserError, "config.reinforce.reward", "config.evaluation.judge"):
    rewards.reward_of(dataclasses.replace(settings, evaluation=evaluation))
  assert rewards.reward_of(settings_of(reward="clip")) is rewards.clip_scores


def test_clip_scores_captions_alone(layout):
  """An edit has no caption, so its samples have no CLIP score."""
  records = [p.record for p in read_prompts(settings_of(), layout, 2)]
  samples = [Scored(0.25), Scored(None)]
  assert rewards.clip_scores(records[:1], samples[:1]).tolist() == [0.25]
  with refused(UserError, "config.reinforce.reward", records[1].key):
    rewards.clip_scores(records, samples)


@pytest.mark.parametrize("fields", [{"global_batch_size": 18}, {"gradient_accumulation_steps": 2}])
def test_a_batch_of_parts_of_groups_is_refused(objective, fields):
  train = dataclasses.replace(objective.settings.train, **fields)
  settings = dataclasses.replace(objective.settings, train=train)
  with refused(UserError, "config.train.global_batch_size"):
    rollouts.Rollouts(settings, [], lambda params: None, low_codes, {})


def test_spread_is_the_share_of_codes_in_which_samples_differ():
  codes = np.array([[[1, 2], [1, 3], [1, 2]]])
  np.testing.assert_allclose(rollouts.differences(codes), [[1 / 4, 1 / 2, 1 / 4]])
  assert rollouts.spread(codes) == pytest.approx(1 / 3)
  assert rollouts.spread(codes[:, [0, 2]]) == 0


def test_of_two_correct_samples_the_more_unusual_one_has_the_higher_reward():
  codes = np.array([[[1, 2], [1, 3], [1, 2]]])  # Differences 1/4, 1/2, 1/4; their mean is 1/3.
  found = rollouts.diverse(np.array([[1.0, 1.0, 0.0]]), codes, weight=3.0)
  np.testing.assert_allclose(found, [[0.75, 1.5, 0.0]])
  assert rollouts.diverse(np.array([[1.0, -1.0, 0.0]]), codes, weight=0.0).tolist() == [[1, -1, 0]]
  with refused(UserError, "diversity_weight", "-1"):
    rollouts.diverse(np.array([[1.0, -1.0, 0.0]]), codes, weight=3.0)


def test_true_images_have_the_whole_reward_and_other_images_less(layout):
  prompts = read_prompts(settings_of(), layout, 12)
  records = [prompt.record for prompt in prompts]
  images = [p.record.images["after" if p.task.name == "recolor" else "image"] for p in prompts]
  samples = [SampleOf((square_pixels(image, 48),)) for image in images]
  assert judged(records, samples).tolist() == [1.0] * 12
  # Negative control: each sample is scored for the task's next prompt.
  assert judged(records, samples[2:] + samples[:2]).max() == 0


@dataclasses.dataclass(frozen=True)
class Scored:
  """Fake `Sample` with the field that the CLIP reward reads."""

  clip_score: float | None


@dataclasses.dataclass(frozen=True)
class SampleOf:
  """Fake `Sample` with the field that the judge reads."""

  segments: tuple


def rewarded(objective, scores):
  """Returns an objective whose group of prompt i has the rewards `scores[i % len(scores)]`."""
  seen = itertools.count()

  def reward(records, samples):
    return np.concatenate([scores[next(seen) % len(scores)] for _ in samples[::GROUP]])

  return dataclasses.replace(objective, reward=reward)


def test_a_step_depends_on_its_number_alone_and_groups_share_their_prompt(objective):
  with one_device():
    data = objective.batches(0, BATCH)
    first, second = itertools.islice(data, 2)
    later = objective.batches(BATCH, BATCH)
    assert (first, second, next(later)) == (range(8), range(8, 16), range(8, 16))
    one, numbers = objective.draw(objective.reference, second)
    again, _ = objective.draw(objective.reference, second)
    other, _ = objective.draw(objective.reference, first)
  jax.tree.map(np.testing.assert_array_equal, one, again)
  assert not np.array_equal(one.codes, other.codes)
  assert numbers.keys() == {"reward", "reward_std", "spread", "dead_groups", "prompts"}
  assert 0 < numbers["spread"] <= 1
  assert (numbers["dead_groups"], numbers["prompts"]) == (0, 4)
  np.testing.assert_allclose(one.advantages.reshape(4, GROUP).mean(1), 0, atol=1e-6)
  prompts = one.inputs.reshape(4, GROUP, -1)[..., : -3 * objective.length]
  assert (prompts == prompts[:, :1]).all()


def test_edits_have_three_streams_and_images_for_captions_two(objective):
  """The weight of the missing stream is 0."""
  with one_device():
    one, _ = objective.draw(objective.reference, range(8))
  guidance = one.guidance.reshape(4, GROUP, -1, 3)
  streams = sorted((guidance != 0).all((1, 2)).sum(-1).tolist())
  assert streams == [2, 2, 3, 3]
  assert (guidance[..., :2] != 0).all()
  np.testing.assert_allclose(guidance.sum(-1), 1, rtol=1e-6)


WRONG, RIGHT = np.zeros(GROUP, np.float32), np.ones(GROUP, np.float32)
ONE, HALF = np.float32([0, 0, 0, 1]), np.float32([0, 1, 0, 1])


@pytest.mark.parametrize(
  ("scores", "prompts", "used"),
  [
    ([ONE] * 8, 4, [ONE] * 4),  # One round is enough.
    ([ONE, HALF, WRONG, RIGHT, HALF, ONE, ONE, ONE], 8, [HALF, HALF, ONE, ONE]),
    ([WRONG, RIGHT, WRONG, RIGHT, WRONG, HALF, WRONG, WRONG], 8, [HALF, WRONG, RIGHT, WRONG]),
  ],
)
def test_groups_without_spread_are_refilled_and_the_rest_is_closest_to_a_half(
  objective, scores, prompts, used
):
  with one_device():
    rollout, numbers = rewarded(objective, scores).draw(objective.reference, range(8))
  assert numbers["prompts"] == prompts
  drawn = np.stack(scores[:prompts])
  assert numbers["dead_groups"] == np.mean(np.ptp(drawn, 1) == 0)
  assert numbers["reward"] == pytest.approx(drawn.mean())
  found = rollout.advantages.reshape(4, GROUP)
  np.testing.assert_allclose(found, [x - x.mean() for x in used], atol=1e-6)


def test_with_a_diversity_weight_groups_of_correct_samples_teach(objective):
  """The rewards alone decide which groups are used, and what is logged."""
  reinforce = dataclasses.replace(objective.settings.reinforce, diversity_weight=2.0)
  diverse = dataclasses.replace(
    objective, settings=dataclasses.replace(objective.settings, reinforce=reinforce)
  )
  scores = [RIGHT, WRONG, RIGHT, WRONG, RIGHT, HALF, WRONG, WRONG]
  with one_device():
    rollout, numbers = rewarded(diverse, scores).draw(objective.reference, range(8))
  assert (numbers["dead_groups"], numbers["reward"]) == (7 / 8, 3.5 / 8)
  differences = rollouts.differences(rollout.codes.reshape(4, GROUP, -1))
  unusual = 2 * (differences - differences.mean(1, keepdims=True))
  half = HALF * (1 + unusual[0])
  expected = [half - half.mean(), unusual[1], WRONG, unusual[3]]
  np.testing.assert_allclose(rollout.advantages.reshape(4, GROUP), expected, atol=1e-6)
  assert np.ptp(unusual[1]) > 0


def learn(objective):
  """Returns the parameters after the steps of the config, and the reward of each step."""
  settings = objective.settings
  optimizer = create_optimizer(settings.optimizer, settings.train.steps)
  params = jax.tree.map(jnp.copy, objective.reference)
  state = TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))
  take_step, data = objective.take_step, objective.batches(0, BATCH)
  found = []
  for _ in range(settings.train.steps):
    state, metrics = take_step(state, next(data))
    found.append(float(metrics["reward"]))
  return state.params, found


@pytest.mark.slow
def test_learning_raises_the_reward_and_measures_it(objective, layout):
  with one_device():
    params, found = learn(objective)
    heldout = read_heldout(objective.settings, layout, 4)
    before, after = (objective.measure(p, heldout) for p in (objective.reference, params))
  assert np.mean(found[-3:]) > np.mean(found[:3]) + 0.1
  assert list(after) == ["all", *NAMES]
  assert after["all"]["reward"] > before["all"]["reward"] + 0.1
  assert after["draw"].keys() == {"reward", "spread", "by_prompt"}
  assert len(after["all"]["by_prompt"]) == 4
  assert np.mean(after["all"]["by_prompt"]) == pytest.approx(after["all"]["reward"])
  of_tasks = [after[name]["spread"] for name in NAMES]
  assert after["all"]["spread"] == pytest.approx(np.mean(of_tasks))


def trained_on(objective, prompts, sampling):
  """Draws groups, and returns their samples, requests and rollout.

  Checks that the rollout has the log-probabilities of the samples.
  """
  samples = []

  def kept(records, found):
    samples.extend(found)
    return np.zeros(len(found), np.float32)

  with one_device():
    pipeline = objective.pipeline_of(objective.reference)
    groups = dataclasses.replace(objective, reward=kept).groups(
      pipeline, prompts, range(len(prompts)), sampling
    )
    requests, codes = [group.request for group in groups], rollouts._stacked(groups)[0]
    values = np.zeros((len(prompts), GROUP), np.float32)
    made = rollouts._rollout(pipeline, requests, codes, values, sampling)
    fixed = SETTINGS.model, SETTINGS.vocab.text_size, sampling.temperature
    compute = jax.jit(functools.partial(grpo.guided_log_probs, *fixed))
    found = np.asarray(compute(objective.reference, grpo.place(made)))
  expected = [sample.log_probs[:16] for sample in samples]
  sampled = np.take_along_axis(found, made.codes[..., None], -1)[..., 0]
  np.testing.assert_allclose(sampled, expected, atol=2e-5)
  return samples, requests, made


@pytest.mark.slow
def test_retrieved_neighbors_are_in_the_prompts_that_a_step_trains_on(objective, workdir, layout):
  """Captions get the neighbors that the samples were drawn with; edits get none."""
  clip = CLIP(SETTINGS.clip, SETTINGS.vocab.text_size, clip_params(SETTINGS), layout.encode)
  reinforce = dataclasses.replace(objective.settings.reinforce, retrieve=1)
  searching = dataclasses.replace(
    objective,
    settings=dataclasses.replace(objective.settings, reinforce=reinforce),
    pipeline_of=functools.partial(objective.pipeline_of, clip=clip, bank=workdir),
  )
  samples, requests, _ = trained_on(searching, objective.prompts[:2], objective.sampling)
  [neighbor], none = samples[0].neighbors, samples[-1].neighbors
  assert none == ()
  caption = neighbor.segments[0].tokens
  assert requests[0].streams[0][1 : 1 + len(caption)].tolist() == caption.tolist()
