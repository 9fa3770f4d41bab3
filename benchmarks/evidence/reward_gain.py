"""Measures what trainings with rewards gained on held-out prompts, and counts it a second time.

  python -m benchmarks.evidence.reward_gain --start=workdir/scenes_instruct --runs=workdir/rl

The start and each run (folders or bundles) draw images for the same held-out prompts, with the same
seeds and the settings `sampling` of the config. The config must be that of the runs: no step of
such a run had one of these prompts. `--skip` leaves out the first of them. The images are judged,
and counted again by the nearest true drawings (`scene_recount`). Prints, for each run
and for the mean of the runs, the share of correct images, the gain with its 95% interval over
prompts, the share of the start's failures that is gone, and the share of the start's spread that is
left: of codes, as `cm3leon reinforce` prints it, and of pixels. The interval does not cover the
seed of a training, and the mean is useful only for runs that differ in their seed.

Although no step had a held-out prompt, a step can have had a prompt with the same claims in other
words, and so can the trainings before it. With `--trained`, a second table counts only prompts
whose claims none of these trainings made.
"""

# N prompts, G samples per prompt, P pixel values of an image.

from collections.abc import Sequence
import dataclasses
import itertools
from typing import NamedTuple

from absl import app, flags, logging
import jax
from jaxtyping import Bool, Float, UInt8
from ml_collections import config_flags
import numpy as np

from benchmarks.evidence import scene_recount
from cm3leon_jax.config.settings import Settings, settings_from_config
from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation.intervals import mean_interval
from cm3leon_jax.generation.tasks import PromptLayout
from cm3leon_jax.mesh import create_mesh
from cm3leon_jax.reinforcement.prompts import Prompt, read_prompts
from cm3leon_jax.reinforcement.rollouts import Rollouts, open_rollouts, spread
from cm3leon_jax.run.run import Run
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from examples.scenes import config as demo
from examples.scenes import source
from examples.scenes.judge.baselines import claims_of

HEADER = (
  "| run | correct | gain, points | failures gone "
  "| correct, counted again | gain, points | failures gone | spread, share of the start's "
  "| of pixels |"
)


class Drawn(NamedTuple):
  """Shares of correct samples of each prompt, by the judge and counted again, and the spread.

  `pixels` is the mean absolute difference of two images of a prompt, in pixel values.
  """

  judged: Float[np.ndarray, " N"]
  counted: Float[np.ndarray, " N"]
  spread: float
  pixels: float

  def of(self, chosen: Bool[np.ndarray, " N"]) -> "Drawn":
    """Returns the shares of some prompts. The spreads stay those of all prompts."""
    return self._replace(judged=self.judged[chosen], counted=self.counted[chosen])


def claims_of_training(settings: Settings, layout: PromptLayout) -> set[tuple]:
  """Returns the claims of all captions and of all `draw` prompts that a run was trained on."""
  config = demo.scenes_of(settings)
  facts = [source.pair(config, "train", i).facts for i in range(config.train)]
  if settings.instructions.any:
    drawn = dataclasses.replace(settings.reinforce, tasks=("draw",))
    count = settings.instructions.max_records or config.train
    prompts = read_prompts(dataclasses.replace(settings, reinforce=drawn), layout, count)
    facts += [prompt.record.facts for prompt in prompts]
  return {claims_of(one["include"]) for one in facts}


def draw(
  objective: Rollouts, params: dict, prompts: Sequence[Prompt], tokenizer: ImageTokenizer
) -> Drawn:
  """Draws the samples of all prompts with `config.sampling`, and counts the correct ones twice."""
  numbers, sampling = range(len(prompts)), objective.settings.sampling
  groups = objective.groups(objective.pipeline_of(params), prompts, numbers, sampling)
  codes = np.stack([group.codes for group in groups])
  images = tokenizer.decode(codes.reshape(-1, codes.shape[-1]))
  shown = scene_recount.objects_of(images)
  asked = [prompt.record.facts["include"] for prompt in prompts for _ in range(codes.shape[1])]
  counted = [scene_recount.is_correct(*pair) for pair in zip(shown, asked, strict=True)]
  judged = np.stack([group.rewards for group in groups])
  shares = judged.mean(1), np.reshape(counted, judged.shape).mean(1)
  return Drawn(*shares, spread(codes), pixel_spread(images.reshape(*judged.shape, -1)))


def pixel_spread(images: UInt8[np.ndarray, "N G P"]) -> float:
  """Returns the mean absolute difference of two images of a prompt, averaged over all pairs."""
  pairs = itertools.combinations(np.moveaxis(images.astype(np.float32), 1, 0), 2)
  return float(np.mean([np.abs(a - b).mean() for a, b in pairs]))


def line(name: str, start: Drawn, drawn: Drawn) -> str:
  """Formats the line of a run in the table."""
  cells = [name]
  for before, after in ((start.judged, drawn.judged), (start.counted, drawn.counted)):
    gain = mean_interval(after - before, np.ones(len(before)), np.arange(len(before)))
    low, high = (100 * gain[bound] for bound in ("low", "high"))
    failures = 1 - before.mean()
    cells.append(f"{before.mean():.1%} -> {after.mean():.1%}")
    cells.append(f"{100 * gain['mean']:+.1f} [{low:+.1f}, {high:+.1f}]")
    cells.append(f"{gain['mean'] / failures:.0%}" if failures else "-")
  for left, before in ((drawn.spread, start.spread), (drawn.pixels, start.pixels)):
    cells.append(f"{left / before:.1%}" if before else "-")
  return f"| {' | '.join(cells)} |"


def mean(drawn: Sequence[Drawn]) -> Drawn:
  """Returns the means over runs."""
  judged, counted, *spreads = zip(*drawn)
  return Drawn(np.mean(judged, 0), np.mean(counted, 0), *(float(np.mean(x)) for x in spreads))


def main(argv: Sequence[str]) -> None:
  args = flags.FLAGS
  logging.set_verbosity(logging.WARNING)
  if len(argv) > 1 or not (args.start and args.runs):
    raise UserError("name the start and the runs: --start=RUN --runs=RUN,RUN")
  settings = settings_from_config(args.config)
  if settings.reinforce.reward != "judge":
    raise UserError("config.reinforce.reward must be 'judge': only judged images are counted.")
  first = Run.open(args.start, settings)
  with jax.set_mesh(create_mesh(first.settings.mesh)):
    params, _ = first.params()
    objective, prompts = open_rollouts(first, params, first.bank)
    if not (prompts := prompts[args.skip :]):
      raise UserError(f"--skip is {args.skip}; it must be below config.reinforce.heldout_prompts.")
    start = draw(objective, params, prompts, first.images)
    print(f"{len(prompts)} prompts with {settings.reinforce.samples} samples each", flush=True)
    drawn = [
      draw(objective, Run.open(name, settings).params()[0], prompts, first.images)
      for name in args.runs
    ]
  print_table(args.runs, start, drawn)
  if args.trained:
    known = {claims_of(prompt.record.facts["include"]) for prompt in objective.prompts}
    for name in args.trained:
      known |= claims_of_training(Run.open(name).settings, PromptLayout.of(first))
    claims = [claims_of(prompt.record.facts["include"]) for prompt in prompts]
    is_new = np.array([one not in known for one in claims])
    print(f"\n{is_new.sum()} of these prompts make claims that no training made")
    print_table(args.runs, start.of(is_new), [one.of(is_new) for one in drawn])


def print_table(names: Sequence[str], start: Drawn, drawn: Sequence[Drawn]) -> None:
  """Prints a line for each run, and for the mean of several runs."""
  print(f"\n{HEADER}\n|{'---|' * 9}")
  for name, one in zip(names, drawn, strict=True):
    print(line(name, start, one))
  if len(drawn) > 1:
    print(line("mean", start, mean(drawn)), flush=True)


if __name__ == "__main__":  # Tests import this module without flags.
  config_flags.DEFINE_config_file("config", "examples/scenes/reinforce.py", "Config file.")
  flags.DEFINE_string("start", "", "Run or bundle from which the runs started.")
  flags.DEFINE_list("runs", [], "Runs of `cm3leon reinforce`.")
  flags.DEFINE_list("trained", [], "Runs or bundles whose claims the second table leaves out.")
  flags.DEFINE_integer(
    "skip", 0, "First held-out prompts to leave out, on which a setting was chosen.", lower_bound=0
  )
  app.run(main)
