"""Measures how well image tokenizers reconstruct scenes, and rare objects that they never saw.

  python -m benchmarks.scene_codes --runs=workdir/scenes,workdir/other --workdir=workdir/scene_codes

A decoder that predicts the codes of the true image draws this reconstruction, so the share of
correct ones is about the highest that the decoder of the run can reach. `--runs` are workdirs whose
stage `vqgan` is finished. For the held-out rare objects and for 600 held-out scenes, the table has
the share of reconstructions that the judge calls correct, and their mean PSNR. Takes seconds.
Writes results.json and table.md.
"""

from collections.abc import Sequence
import pathlib

from absl import app, flags
import numpy as np

from benchmarks import experiment, scene_card
from cm3leon_jax.config import UserError
from cm3leon_jax.configs import scenes as config_scenes
from cm3leon_jax.scenes import source
from cm3leon_jax.scenes.drawings import render
from cm3leon_jax.scenes.judge import judge
from cm3leon_jax.scenes.world import Scene
from cm3leon_jax.settings import settings_from_config
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from cm3leon_jax.training.small.vqgan_training import mean_squared_errors

SCENES = 600


def drawings() -> dict[str, tuple[np.ndarray, list[dict]]]:
  """Returns name of a set -> its images, [n, H, W, 3] uint8, and the facts that they show."""
  config = settings_from_config(config_scenes.get_config()).scenes
  rare = list(scene_card.rare(config))
  pairs = [source.pair(config, "heldout", i) for i in range(SCENES)]
  shown = {
    "rare objects": ([Scene((one.placed,)) for one in rare], [one.facts for one in rare]),
    "held-out scenes": ([Scene.parse(x.image) for x in pairs], [x.facts for x in pairs]),
  }
  return {
    name: (np.stack([render(scene) for scene in of]), facts) for name, (of, facts) in shown.items()
  }


def measure(tokenizer: ImageTokenizer, images: np.ndarray, facts: Sequence[dict]) -> dict:
  """Returns the share of correct reconstructions, and their mean PSNR in dB."""
  found = tokenizer.decode(tokenizer.encode(images))
  errors = np.maximum(mean_squared_errors(images, found), 1e-10)
  correct = [verdict.correct for verdict in judge.judge_all(found, facts)]
  return {"correct": float(np.mean(correct)), "psnr_db": float(np.mean(-10 * np.log10(errors)))}


def markdown(result: dict) -> str:
  """Formats one line per run."""
  sets = list(next(iter(result.values())))
  lines = [f"| run | {' | '.join(sets)} |", f"|{'---|' * (1 + len(sets))}"]
  for run, of_sets in result.items():
    cells = [f"{of['correct']:.1%}, {of['psnr_db']:.1f} dB" for of in of_sets.values()]
    lines.append(f"| {run} | {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise UserError(f"unexpected argument '{argv[1]}': this command takes flags only.")
  given = flags.FLAGS
  shown, result = drawings(), {}
  for run in given.runs:
    tokenizer = ImageTokenizer.load(pathlib.Path(run) / "vqgan")
    result[run] = {name: measure(tokenizer, *of) for name, of in shown.items()}
  workdir = pathlib.Path(given.workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  experiment.write_results(workdir, result, markdown(result))
  print(markdown(result))


if __name__ == "__main__":
  flags.DEFINE_list("runs", ["workdir/scenes"], "Workdirs with a finished stage `vqgan`.")
  flags.DEFINE_string("workdir", "workdir/scene_codes", "Folder of the results.")
  app.run(main)
