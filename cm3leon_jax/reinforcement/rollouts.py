"""Defines the objective of `cm3leon reinforce`: rewards of samples that the policy draws."""

# N prompts, G samples per prompt, B = N x G samples, I codes per image.

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

from etils import epath
from jaxtyping import Float, Float32, Int32
import numpy as np

from cm3leon_jax.config.sampling import SamplingConfig
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.decoding.request import Request
from cm3leon_jax.errors import UserError
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.generation.record_prompts import prompt_of
from cm3leon_jax.generation.tasks import PromptLayout
from cm3leon_jax.positions import positions_of
from cm3leon_jax.reinforcement.prompts import Prompt, read_heldout, read_prompts
from cm3leon_jax.reinforcement.rewards import Reward, reward_of
from cm3leon_jax.run.run import Run
from cm3leon_jax.training.step import grpo
from cm3leon_jax.training.step.state import TrainState


class Group(NamedTuple):
  """The samples of one prompt."""

  prompt: Prompt
  request: Request
  codes: Int32[np.ndarray, "G I"]
  rewards: Float32[np.ndarray, " G"]

  @property
  def is_dead(self) -> bool:
    """Whether all rewards are equal, before their diversity counts."""
    return bool(np.ptp(self.rewards) == 0)


def differences(codes: Int32[np.ndarray, "N G I"]) -> Float[np.ndarray, "N G"]:
  """Returns, for each sample, the mean share of codes in which the others of its prompt differ.

  codes [[[1 2] [1 3] [1 2]]] -> [[1/4 1/2 1/4]]
  """
  differ = (codes[:, :, None] != codes[:, None]).mean(-1)
  return differ.sum(2) / (codes.shape[1] - 1)


def spread(codes: Int32[np.ndarray, "N G I"]) -> float:
  """Returns the share of codes in which two samples of a prompt differ, averaged over all pairs."""
  return float(differences(codes).mean())


def diverse(
  rewards: Float[np.ndarray, "N G"], codes: Int32[np.ndarray, "N G I"], weight: float
) -> Float[np.ndarray, "N G"]:
  """Multiplies rewards by 1 + weight x (difference - its mean over the samples of the prompt).

  The difference is that of `differences`. See `ReinforceConfig.diversity_weight`.

  Raises:
    UserError: the weight is not 0, and a reward is negative.
  """
  if weight and rewards.min() < 0:
    raise UserError(
      f"config.reinforce.diversity_weight is {weight}, but the reward of a sample is "
      f"{rewards.min():.3g}: use rewards that are not negative, or the weight 0."
    )
  result = differences(codes)
  return rewards * (1 + weight * (result - result.mean(1, keepdims=True)))


@dataclasses.dataclass
class Rollouts:
  """`training.objective.Objective` of a run that trains on samples of the current policy.

  A step samples images for its prompts with the current parameters, scores the samples, and takes
  one `grpo.policy_step`. Each step has its own `reinforce.rounds` x N prompts, of which it uses as
  many as it needs, see `draw`. Prompts and seeds depend only on the number of the step, so a
  resumed run uses the same prompts and seeds.

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

  @functools.cached_property
  def _update(self) -> Callable:
    settings = self.settings
    return grpo.compile_step(
      settings.model,
      settings.optimizer,
      settings.reinforce,
      settings.train.steps,
      settings.vocab.text_size,
    )

  def take_step(self, state: TrainState, numbers: range) -> tuple[TrainState, dict[str, Any]]:
    """Trains on samples for the prompts with these numbers."""
    rollout, scores = self.draw(state.params, numbers)
    state, metrics = self._update(state, self.reference, grpo.place(rollout))
    return state, {**metrics, **scores}

  def batches(self, next_row: int, rows: int) -> Iterator[range]:
    """Yields the numbers of the prompts of each step; see `training.objective.Objective`."""
    rounds, group = self.settings.reinforce.rounds, self.settings.reinforce.samples
    first, each = next_row // group * rounds, rows // group * rounds
    return (range(n, n + each) for n in itertools.count(first, each))

  def explain(self, rows: range) -> str:
    """Names the prompts of the skipped steps; see `training.objective.Objective`."""
    rounds, group = self.settings.reinforce.rounds, self.settings.reinforce.samples
    first, last = rows[0] // group * rounds, (rows[-1] // group + 1) * rounds - 1
    return f"their samples are of the prompts {first} to {last} of the run"

  def draw(self, params: dict, numbers: Sequence[int]) -> tuple[grpo.Rollout, dict[str, float]]:
    """Draws and scores samples for a training step, in rounds of N prompts.

    After each round, groups whose rewards are all equal are dropped, and another round refills the
    batch, until N groups have spread or all prompts of the step are used (dynamic sampling of DAPO,
    arXiv:2503.14476). The N groups with the largest variance of their rewards are used: if a reward
    is 0 or 1, those whose share of right images is closest to 1/2. Missing groups are filled up
    with dead groups, whose advantages are 0 if `reinforce.diversity_weight` is 0.

    `numbers` are the numbers of the step's prompts, counted from 0 over the whole run. Returns the
    rollout, and measures over all groups that were drawn: "reward"; "reward_std", the standard
    deviation of a prompt's rewards; "spread"; "dead_groups", the share of groups without spread;
    and "prompts", the number of groups.
    """
    pipeline = self.pipeline_of(params)
    wanted = len(numbers) // self.settings.reinforce.rounds
    drawn: list[Group] = []
    for start in range(0, len(numbers), wanted):
      chosen = numbers[start : start + wanted]
      prompts = [self.prompts[number % len(self.prompts)] for number in chosen]
      drawn += self.groups(pipeline, prompts, chosen, self.sampling)
      if sum(not group.is_dead for group in drawn) >= wanted:
        break
    used = sorted(drawn, key=lambda group: -group.rewards.var())[:wanted]
    codes, rewards = _stacked(drawn)
    return self.rollout(pipeline, used), {
      "reward": float(rewards.mean()),
      "reward_std": float(rewards.std(1).mean()),
      "spread": spread(codes),
      "dead_groups": float(np.mean([group.is_dead for group in drawn])),
      "prompts": float(len(drawn)),
    }

  def measure(self, params: dict, prompts: Sequence[Prompt]) -> dict[str, dict]:
    """Draws samples with `config.sampling`, not with the settings of training, and scores them.

    Returns {"all": measures over all prompts, task: measures over its prompts}. The measures are
    the mean reward, `spread`, and `by_prompt`, the mean reward of each prompt.
    """
    numbers, sampling = range(len(prompts)), self.settings.sampling
    groups = self.groups(self.pipeline_of(params), prompts, numbers, sampling)
    codes, rewards = _stacked(groups)
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

  def groups(
    self,
    pipeline: Pipeline,
    prompts: Sequence[Prompt],
    numbers: Sequence[int],
    sampling: SamplingConfig,
  ) -> list[Group]:
    """Draws and scores `reinforce.samples` samples per prompt, whose number determines the seed."""
    base, config = self.settings.seed * 1_000_003, self.settings.reinforce
    tasks = [
      prompt_of(
        prompt.task,
        prompt.record,
        seed=(base + number) % 2**32,
        sampling=sampling,
        retrieve=config.retrieve,
      )
      for prompt, number in zip(prompts, numbers, strict=True)
    ]
    given = pipeline.check(tasks)
    samples = pipeline.generate(tasks, config.samples, given=given)
    requests = pipeline.requests(tasks, given, [group[0].neighbors for group in samples])
    records = [prompt.record for prompt in prompts for _ in range(config.samples)]
    rewards = self.reward(records, list(itertools.chain(*samples))).reshape(len(tasks), -1)
    codes = [np.stack([sample.codes[0] for sample in group]) for group in samples]
    return [Group(*parts) for parts in zip(prompts, requests, codes, rewards)]

  def rollout(self, pipeline: Pipeline, groups: Sequence[Group]) -> grpo.Rollout:
    """Builds the arrays that a step trains on from groups that were drawn with `sampling`."""
    codes, rewards = _stacked(groups)
    requests = [group.request for group in groups]
    values = grpo.advantages(diverse(rewards, codes, self.settings.reinforce.diversity_weight))
    return _rollout(pipeline, requests, codes, values, self.sampling)


def _stacked(groups: Sequence[Group]) -> tuple[np.ndarray, np.ndarray]:
  """Returns the codes, int32 [N, G, I], and the rewards, fp32 [N, G], of groups."""
  return np.stack([group.codes for group in groups]), np.stack([group.rewards for group in groups])


def open_rollouts(
  run: Run, reference: dict, bank: epath.Path | None
) -> tuple[Rollouts, list[Prompt]]:
  """Opens the prompts and the reward of a run. Returns the objective and the held-out prompts.

  Args:
    run: the run, with its tokenizers.
    reference: see `Rollouts`.
    bank: folder with the documents that `reinforce.retrieve` retrieves; None: there is no bank.

  Raises:
    UserError: there is no bank; see also `read_prompts`, `read_heldout` and `reward_of`.
  """
  settings, config = run.settings, run.settings.reinforce
  if config.retrieve and bank is None:
    raise UserError(
      f"config.reinforce.retrieve is {config.retrieve}, but neither the run nor the run that it "
      "starts from has documents to retrieve: set it to 0."
    )
  reward, layout = reward_of(settings), PromptLayout.of(run)
  drawn = settings.train.steps * settings.train.global_batch_size // config.samples
  prompts = read_prompts(settings, layout, drawn * config.rounds)
  heldout = read_heldout(settings, layout, config.heldout_prompts, prompts)
  pipeline = Pipeline(
    reference,
    settings,
    layout,
    run.images,
    clip=run.clip if config.retrieve or config.reward == "clip" else None,
    bank=bank if config.retrieve else None,
    batch_size=settings.train.global_batch_size,
  )
  pipeline.generator.params = {}  # Only the pipelines of the steps generate.
  return Rollouts(settings, prompts, pipeline.with_params, reward, reference), heldout


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
      image = vocab.image_ids(sampled)
      row = [np.concatenate([request.streams[stream], image]) for stream in order]
      rows.append([(ids, positions_of(ids, vocab, align)) for ids in row])
  arrays = grpo.pack_rows(rows, image_tokens, vocab.pad)
  flat = codes.reshape(-1, image_tokens).astype(np.int32)
  return grpo.Rollout(*arrays, flat, np.stack(guidance), values.reshape(-1))
