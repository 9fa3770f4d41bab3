"""Measures whether small decoders learn to copy an object from their neighbor, whatever the seed.

  python -m benchmarks.copying --widths=56,84,128 --seeds=0,1,2,3,4 --workdir=workdir/learning

Trains decoders of several widths on a condition of `benchmarks.learning`, by default
`several_objects`, for 1,500 steps, and computes the bits of images of rare objects that training
never shows, after the document of the object at the same place, and without a document. A decoder
copies if the document saves at least a quarter of the bits. The tokenizers are those of
`benchmarks.learning` in the same workdir. Finished parts are skipped. Writes copying.json and
copying.md.
"""

from collections.abc import Sequence
import operator
import pathlib

from absl import app, flags
import numpy as np

from benchmarks import experiment, learning, scene_card
from cm3leon_jax import CM3Leon
from cm3leon_jax.files.json_files import write_json

STEPS = 1_500
COPIES = 0.75  # Highest share of the bits without a document, for a decoder that copies.
MLP_RATIO = 352 / 128  # Feed-forward width of the demo, divided by its width.
HEADS = 2  # As in the demo.


def fields(condition: str, width: int, head_size: int, seed: int, steps: int) -> dict:
  """Returns the config fields of a run that differ from the config `scenes`."""
  size = {"width": width, "mlp_width": round(MLP_RATIO * width)}
  if head_size != width // HEADS:  # The default of the model.
    size["head_size"] = head_size
  size = {f"model.{name}": value for name, value in size.items()}
  return {**learning.fields(condition, seed, steps), **size}


def measure(run: pathlib.Path) -> dict:
  """Computes the mean bits per code of the images of rare objects after each kind of neighbor."""
  model = CM3Leon.load(run, batch_size=scene_card.BATCH)
  asked = list(scene_card.rare(model.pipeline.settings.scenes))
  scored = scene_card.neighbor_bits(model, asked)
  return {"bits": {name: float(np.mean(values)) for name, values in scored.items()}}


def run_one(
  workdir: pathlib.Path, condition: str, width: int, head_size: int, seed: int, steps: int
) -> dict:
  """Trains and measures a decoder, unless it is done."""
  run = workdir / f"copying_{steps}" / f"{condition}_width_{width}_head_{head_size}_seed_{seed}"
  data = learning.prepare(workdir, learning.CONDITIONS[condition][0])
  experiment.link_stages(data, run, learning.STAGES)
  changes = fields(condition, width, head_size, seed, steps)
  experiment.run_stage("train", learning.CONFIG, run, changes)
  bits = experiment.measured_once(run, {}, lambda: measure(run))["bits"]
  return {
    "condition": condition, "width": width, "head_size": head_size, "seed": seed, "bits": bits,
  }  # fmt: skip


def markdown(runs: Sequence[dict]) -> str:
  """Formats one line per condition, width and size of heads, with the values of all seeds."""
  titles = ("condition", "width", "head size", "bits: same place", "no document", "ratio", "copy")
  lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
  size = operator.itemgetter("condition", "width", "head_size")
  for chosen in dict.fromkeys(map(size, runs)):
    own = [run for run in runs if size(run) == chosen]
    after, without = ([run["bits"][name] for run in own] for name in ("own", "none"))
    ratios = np.divide(after, without)
    cells = [*map(str, chosen), *map(_values, (after, without, ratios))]
    cells.append(f"{np.sum(ratios <= COPIES)} of {len(own)}")
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def _values(values: Sequence[float]) -> str:
  return ", ".join(f"{value:.2f}" for value in values)


def main(argv: Sequence[str]) -> None:
  given = flags.FLAGS
  names = experiment.chosen_conditions(argv, given.conditions, learning.CONDITIONS)
  workdir = pathlib.Path(given.workdir).resolve()
  runs = []
  for seed in map(int, given.seeds):
    for name in names:
      for width in map(int, given.widths):
        head_size = given.head_size or width // HEADS
        runs.append(run_one(workdir, name, width, head_size, seed, given.steps))
        write_json(workdir / "copying.json", {"runs": runs})
        (workdir / "copying.md").write_text(markdown(runs), encoding="utf-8")
        print(markdown(runs), flush=True)


if __name__ == "__main__":
  flags.DEFINE_list("conditions", ["several_objects"], "Conditions of `benchmarks.learning`.")
  flags.DEFINE_list("widths", ["56", "84", "128"], "Widths of the decoder; multiples of 4.")
  flags.DEFINE_integer("head_size", 64, "Size of the two attention heads; 0: half of the width.")
  flags.DEFINE_list("seeds", ["0", "1", "2", "3", "4"], "Seeds of each width.")
  flags.DEFINE_integer("steps", STEPS, "Training steps.", lower_bound=1)
  flags.DEFINE_string("workdir", "workdir/learning", "Folder of all runs.")
  app.run(main)
