"""Defines the objective of `cm3leon reinforce`: rewards of samples that the policy draws."""

# N prompts, G samples per prompt, B = N x G samples, I codes per image.

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import itertools
import sys
from typing import Any, NamedTuple

from jaxtyping import Int32
import numpy as np

from cm3leon_jax.config import UserError
from cm3leon_jax.data.instructions import sources
from cm3leon_jax.data.instructions.config import InstructionTask
from cm3leon_jax.data.instructions.records import Record
from cm3leon_jax.data.instructions.task_files import load_tasks
from cm3leon_jax.decoding.config import SamplingConfig
from cm3leon_jax.decoding.request import Request
from cm3leon_jax.evaluation.world import drawn_tasks
from cm3leon_jax.generation.pipeline import Pipeline, check_tasks
from cm3leon_jax.generation.record_prompts import prompt_of
from cm3leon_jax.generation.sample import Sample
from cm3leon_jax.generation.tasks import PromptLayout
from cm3leon_jax.positions import positions_of
from cm3leon_jax.reinforcement.rewards import Reward
from cm3leon_jax.settings import Settings
from cm3leon_jax.training.step import grpo
from cm3leon_jax.training.step.state import TrainState


class Prompt(NamedTuple):
  """Task and record for which the policy draws images."""

  task: InstructionTask
  record: Record


def image_tasks(settings: Settings) -> list[InstructionTask]:
  """Returns the tasks of `config.reinforce`. Raises UserError if one is unknown."""
  tasks = {task.name: task for task in load_tasks(settings.instructions)}
  for name in settings.reinforce.tasks:
    if name not in tasks:
      raise UserError(
        f"config.reinforce.tasks names '{name}'; config.instructions has {', '.join(tasks)}."
      )
  return [tasks[name] for name in settings.reinforce.tasks]


def read_prompts(settings: Settings, layout: PromptLayout, split: str, count: int) -> list[Prompt]:
  """Reads the first records of the tasks of `config.reinforce`, alternating between them.

  Skips records that are too long for the model. `split` is "train" or "heldout". Returns at most
  `count` prompts.

  Raises:
    UserError: a task has no records that fit, or its target is not an image; see also
      `image_tasks`.
  """
  tasks = image_tasks(settings)
  each = -(-count // len(tasks))
  # `max_records` limits how many records are encoded. The records here are only read.
  config, columns = dataclasses.replace(settings.instructions, max_records=0), []
  for task in tasks:
    if split == "heldout":
      task = dataclasses.replace(task, heldout_records=each)
    opened = sources.open_task(task, split, config, drawn_tasks(settings))
    records = list(itertools.islice(opened, each))
    if not records or task.target not in records[0].images:
      reason = "its target is not an image" if records else f"it has no records of split {split}"
      raise UserError(f"config.reinforce.tasks names '{task.name}', but {reason}.")
    prompts = [Prompt(task, record) for record in records]
    columns.append([prompt for prompt in prompts if _fits(prompt, layout)])
    if not columns[-1]:
      raise UserError(
        f"config.reinforce.tasks names '{task.name}', whose {len(records)} records are all longer "
        f"than the {layout.positions} positions of the model."
      )
  turns = itertools.chain.from_iterable(itertools.zip_longest(*columns))
  return [prompt for prompt in turns if prompt is not None][:count]


def _fits(prompt: Prompt, layout: PromptLayout) -> bool:
  unlimited = dataclasses.replace(layout, positions=sys.maxsize)
  return prompt_of(prompt.task, prompt.record).to_request(unlimited).positions <= layout.positions


def spread(codes: Int32[np.ndarray, "N G I"]) -> float:
  """Returns the share of codes in which two samples of a prompt differ, averaged over all pairs.

  codes [[[1 2] [1 3] [1 2]]]: pairs differ in 1/2, 0 and 1/2 of the codes, so the mean is 1/3
  """
  pairs = list(itertools.combinations(range(codes.shape[1]), 2))
  return float(np.mean([codes[:, a] != codes[:, b] for a, b in pairs]))


@dataclasses.dataclass
class Rollouts:
  """`training.objective.Objective` of a run that trains on samples of the current policy.

  A step samples images for its prompts with the current parameters, scores the samples, and takes
  one `grpo.policy_step`. Its prompts and seeds depend only on the number of the step, so a resumed
  run uses the same prompts and seeds.

  Attributes:
    prompts: the steps use them in this order; after the last prompt, the first follows again.
    pipeline_of: returns a pipeline that samples with the given parameters.
    reference: parameters that the policy must stay close to, on the current mesh.
  """

  settings: Settings
  prompts: Sequence[Prompt]
  pipeline_of: Callable[[dict], Pipeline]
  reward: Reward
  reference: dict
  names = ()

  def __post_init__(self) -> None:
    train, group = self.settings.train, self.settings.reinforce.samples
    if train.global_batch_size % group or train.gradient_accumulation_steps > 1:
      raise UserError(
        f"config.train.global_batch_size is {train.global_batch_size} with "
        f"{train.gradient_accumulation_steps} accumulation steps; cm3leon reinforce needs a "
        f"multiple of config.reinforce.samples = {group}, and 1 accumulation step."
      )

  @property
  def length(self) -> int:
    """Number of tokens of an image. Only these tokens have a loss."""
    return self.settings.vqgan.image_tokens

  @property
  def sampling(self) -> SamplingConfig:
    """Sampling settings for training: without top-k and top-p truncation."""
    return dataclasses.replace(
      self.settings.sampling,
      method="top_p",
      temperature=self.settings.reinforce.temperature,
      top_k=0,
      top_p=1.0,
    )

  def begin(self, steps: Any, next_row: int, rows: int, sharding: Any) -> tuple[Callable, Iterator]:
    """Returns the function `take_step(state, numbers)` and an iterator over its `numbers`."""
    del steps, sharding  # Only the cross-entropy objective uses them.
    settings = self.settings
    update = grpo.compile_step(
      settings.model,
      settings.optimizer,
      settings.reinforce,
      settings.train.steps,
      settings.vocab.text_size,
    )

    def take_step(state: TrainState, numbers: range) -> tuple[TrainState, dict[str, Any]]:
      rollout, scores = self.draw(state.params, numbers)
      state, metrics = update(state, self.reference, grpo.place(rollout))
      return state, {**metrics, **scores}

    group = settings.reinforce.samples
    first, each = next_row // group, rows // group
    return take_step, (range(n, n + each) for n in itertools.count(first, each))

  def explain(self, rows: range) -> str:
    """Names the prompts of the skipped steps; see `training.objective.Objective`."""
    group = self.settings.reinforce.samples
    return f"their samples are of the prompts {rows[0] // group} to {rows[-1] // group} of the run"

  def draw(self, params: dict, numbers: Sequence[int]) -> tuple[grpo.Rollout, dict[str, float]]:
    """Draws and scores samples for a training step.

    `numbers` are the numbers of the prompts, counted from 0 over the whole run. Returns the
    rollout, and {"reward", "reward_std", "spread"}. `reward_std` is the standard deviation of a
    prompt's rewards, averaged over the prompts.
    """
    prompts = [self.prompts[number % len(self.prompts)] for number in numbers]
    samples, requests, pipeline = self._sample(params, prompts, numbers, self.sampling)
    codes, rewards = self._score(prompts, samples)
    values = grpo.advantages(rewards)
    rollout = _rollout(pipeline, requests, codes, values, self.sampling)
    return rollout, {
      "reward": float(rewards.mean()),
      "reward_std": float(rewards.std(1).mean()),
      "spread": spread(codes),
    }

  def measure(self, params: dict, prompts: Sequence[Prompt]) -> dict[str, dict]:
    """Draws samples with `config.sampling`, not with the settings of training, and scores them.

    Returns {"all": measures over all prompts, task: measures over its prompts}. The measures are
    the mean reward, `spread`, and `by_prompt`, the mean reward of each prompt.
    """
    samples, _, _ = self._sample(params, prompts, range(len(prompts)), self.settings.sampling)
    codes, rewards = self._score(prompts, samples)
    of_task = np.array([prompt.task.name for prompt in prompts])
    result = {}
    for name in ("all", *dict.fromkeys(of_task.tolist())):
      rows = np.flatnonzero((of_task == name) | (name == "all"))
      result[name] = {
        "reward": float(rewards[rows].mean()),
        "spread": spread(codes[rows]),
        "by_prompt": rewards[rows].mean(1).tolist(),
      }
    return result

  def _sample(
    self, params: dict, prompts: Sequence[Prompt], numbers: Sequence[int], sampling: SamplingConfig
  ) -> tuple[list[list[Sample]], list[Request], Pipeline]:
    """Draws `reinforce.samples` samples per prompt. The prompt's number determines their seed."""
    pipeline, base = self.pipeline_of(params), self.settings.seed * 1_000_003
    tasks = [
      prompt_of(prompt.task, prompt.record, seed=(base + number) % 2**32, sampling=sampling)
      for prompt, number in zip(prompts, numbers, strict=True)
    ]
    given = check_tasks(pipeline.layout, tasks, None)
    requests = pipeline.requests(tasks, given, [()] * len(tasks))
    samples = pipeline.generate(tasks, self.settings.reinforce.samples, given=given)
    return samples, requests, pipeline

  def _score(
    self, prompts: Sequence[Prompt], samples: Sequence[Sequence[Sample]]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns the codes of samples, int32 [N, G, I], and their rewards, fp32 [N, G]."""
    codes = np.stack([[sample.codes[0] for sample in group] for group in samples])
    records = [prompt.record for prompt, group in zip(prompts, samples) for _ in group]
    rewards = self.reward(records, list(itertools.chain(*samples)))
    return codes, rewards.reshape(len(samples), -1)


def _rollout(
  pipeline: Pipeline,
  requests: Sequence[Request],
  codes: Int32[np.ndarray, "N G I"],
  values: np.ndarray,
  sampling: SamplingConfig,
) -> grpo.Rollout:
  """Builds the arrays that a step trains on.

  Guidance streams whose weight is always 0 are left out. If a request has fewer streams than
  another, some of its streams are repeated with weight 0. `values` are the advantages, [N, G].
  `sampling` has the settings with which the samples were drawn.
  """
  vocab, align = pipeline.layout.vocab, pipeline.settings.model.align_images
  image_tokens, rows, guidance = codes.shape[-1], [], []
  weights = [r.guidance_weights(sampling, image_tokens)[:-1] for r in requests]
  streams = max(int(w.any(0).sum()) for w in weights)
  for request, group, weight in zip(requests, codes, weights):
    order = np.argsort(~weight.any(0), kind="stable")  # Puts streams with a nonzero weight first.
    order = np.resize(order, streams)
    repeated = np.arange(streams) >= weight.shape[1]
    for sampled in group:
      guidance.append(np.where(repeated, 0, weight[:, order]))
      for stream in order:
        ids = np.concatenate([request.streams[stream], vocab.image_ids(sampled)])
        rows.append((ids, positions_of(ids, vocab, align)))
  arrays = grpo.pad_rows(rows, image_tokens, vocab.pad)
  flat = codes.reshape(-1, image_tokens).astype(np.int32)
  return grpo.Rollout(*arrays, flat, np.stack(guidance), values.reshape(-1))
