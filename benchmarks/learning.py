"""Compares changes of the demo's data and decoder: bound colors, copying, bits.

  python -m benchmarks.learning --conditions=one_codebook,shape_color --seeds=0,1

`several_objects` has the data and the decoder of the config `scenes`. The other conditions have
more scenes of rare objects: `one_codebook` has no pair codes, and the others differ from
`shape_color` by one change. All conditions have the same text tokenizer and CLIP, and each image
tokenizer is trained once. The program trains a decoder for each condition and seed, draws images
for held-out captions and judges them. Half of the captions, chosen by a hash of what they show,
serve to choose between conditions; the other half to report. Finished parts are skipped. Writes
results.json, table.md and learning.png for all finished runs of the folder, and for each run the
images in samples.npz.
"""

from collections.abc import Sequence
import pathlib
import re

from absl import app, flags
import numpy as np

from benchmarks import experiment, learning_table, scene_card
from cm3leon_jax import CM3Leon
from cm3leon_jax.data.sources import splits
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.runs import table as stage_table
from cm3leon_jax.scenes.judge import judge
from cm3leon_jax.scenes.judge.baselines import TrainingScenes

CONFIG = "ml_configs/scenes.py"
STAGES = ("raw", "text_tokenizer", "vqgan", "documents", "clip", "neighbors")
RARE = experiment.OLDER_SCENES
TRAINING = experiment.OLDER_TRAINING  # Of the image tokenizer.
# Condition -> fields that differ from the config `scenes`: those of the data and tokenizers, and
# those of the decoder.
CONDITIONS: dict[str, tuple[dict, dict]] = {
  "one_codebook": (experiment.OLDER, {}),
  "shape_color": ({**RARE, **TRAINING}, {}),
  "free_embeddings": ({**RARE, **TRAINING}, {"model.code_colors": 0}),
  "two_places": ({**RARE, **TRAINING, "scenes.rare_places": 2}, {}),
  "four_places": ({**RARE, **TRAINING, "scenes.rare_places": 4}, {}),
  "several_objects": (TRAINING, {}),
}
COUNTS = {
  "new claims": 300,
  "claims of training": 300,
  "objects never together": 300,
  "color named": 600,
  "no color named": 300,
  "rare": 321,
}
_prepared: set[pathlib.Path] = set()  # Folders whose stages this process has checked.
SEEDS = {"rare": (1, 2)}  # Seeds of the samples of a set; (1,) for all others.
NEVER = 1_000_000


def fields(condition: str, seed: int, steps: int) -> dict:
  """Returns the config fields of a run that differ from the config `scenes`."""
  data, decoder = CONDITIONS[condition]
  often = {"train.eval_every": NEVER, "train.sample_every": NEVER, "train.checkpoint_every": 400}
  return {**data, **decoder, **often, "train.steps": steps, "seed": seed}


def folder_of(workdir: pathlib.Path, data: dict) -> pathlib.Path:
  name = "_".join(f"{field.split('.')[1]}_{value}" for field, value in data.items()) or "demo"
  return workdir / "data" / re.sub(r"[^\w.]+", "_", name)


def prepare(workdir: pathlib.Path, data: dict) -> pathlib.Path:
  """Makes the data of a condition; each tokenizer is trained once. Returns their folder.

  All tokenizers and CLIP are trained on the scenes `RARE`.
  """
  folder = folder_of(workdir, data)
  if folder in _prepared:
    return folder
  codes = {field: value for field, value in data.items() if field.startswith("vqgan.")}
  world = {field: value for field, value in data.items() if field not in codes}
  sources: dict[str, dict] = dict.fromkeys(("text_tokenizer", "clip"), RARE)
  sources |= dict.fromkeys(("raw", "neighbors"), world)
  if codes:
    sources |= {"vqgan": {**RARE, **codes}, "documents": data}
  for stage in stage_table.STAGES:
    if stage not in sources:
      continue
    if sources[stage] == data:
      experiment.run_stage(stage_table.STAGES[stage].command, CONFIG, folder, data)
    else:
      experiment.link_stages(prepare(workdir, sources[stage]), folder, (stage,))
  _prepared.add(folder)
  return folder


def half_of(concept: str) -> str:
  """Returns the half of the captions, "choose" or "report", to which a concept belongs."""
  return "choose" if splits.fraction(f"learning/{concept}") < 0.5 else "report"


def asked_of(model: CM3Leon) -> list[scene_card.Asked]:
  """Returns the captions of all sets."""
  config = model.pipeline.settings.scenes
  trained = TrainingScenes.of_config(config)
  asked = scene_card.common(config, trained, COUNTS)
  return asked + scene_card.spaced(list(scene_card.rare(config)), COUNTS["rare"])


def measure(run: pathlib.Path) -> dict:
  """Draws and judges an image per caption and seed; measures the bits of rare objects."""
  model = CM3Leon.load(run, batch_size=scene_card.BATCH)
  trained = TrainingScenes.of_config(model.pipeline.settings.scenes)
  asked, rows, images = asked_of(model), [], []
  for seed in sorted({seed for seeds in SEEDS.values() for seed in seeds}):
    chosen = [one for one in asked if seed in SEEDS.get(one.group, (1,))]
    drawn, neighbors = scene_card.draw(model, chosen, seed)
    images.append(drawn)
    verdicts = scene_card.judged(chosen, drawn, neighbors)
    rows += [
      {
        "group": one.group, "concept": one.concept, "half": half_of(one.concept), "seed": seed,
        "caption": one.caption, "lookup": trained.known(one.caption, one.facts).image, **verdict,
      }
      for one, verdict in zip(chosen, verdicts)
    ]  # fmt: skip
  of_rare = [one for one in asked if one.group == "rare"]
  images.append(scene_card.draw_moved(model, of_rare, 1)[0])
  rows += [
    {
      "group": "rare moved", "concept": one.concept, "half": half_of(one.concept), "seed": 1,
      "caption": one.caption, "lookup": False, "right": verdict.correct,
    }
    for one, verdict in zip(of_rare, judge.judge_all(images[-1], [one.facts for one in of_rare]))
  ]  # fmt: skip
  np.savez_compressed(run / "samples.npz", images=np.concatenate(images))
  scored = scene_card.neighbor_bits(model, of_rare)
  concepts = [one.concept for one in of_rare]
  return {
    "rows": rows,
    "bits": {name: values.tolist() for name, values in scored.items()},
    "concepts": concepts,
    "halves": list(map(half_of, concepts)),
    "step": model.step,
  }


def run_one(workdir: pathlib.Path, condition: str, seed: int, steps: int) -> None:
  """Trains and measures a condition with a seed, unless it is done."""
  run = workdir / f"steps_{steps}" / f"{condition}_seed_{seed}"
  experiment.link_stages(prepare(workdir, CONDITIONS[condition][0]), run, STAGES)
  experiment.run_stage("train", CONFIG, run, fields(condition, seed, steps))
  experiment.measured_once(run, {"counts": COUNTS}, lambda: measure(run))


def finished(workdir: pathlib.Path, steps: int) -> list[dict]:
  """Returns the measurements of all finished runs in a folder, in the order of CONDITIONS."""
  found, folder = [], workdir / f"steps_{steps}"
  for condition in CONDITIONS:
    for file in sorted(folder.glob(f"{condition}_seed_*/measured/measured.json")):
      seed = int(file.parts[-3].rpartition("_")[-1])
      found.append({**read_json(file), "condition": condition, "seed": seed})
  return found


def main(argv: Sequence[str]) -> None:
  given = flags.FLAGS
  names = experiment.chosen_conditions(argv, given.conditions, CONDITIONS)
  workdir = pathlib.Path(given.workdir).resolve()
  for seed in map(int, given.seeds):
    for name in names:
      run_one(workdir, name, seed, given.steps)
      runs = finished(workdir, given.steps)
      table = learning_table.table(runs)
      experiment.write_results(workdir, {"table": table}, learning_table.markdown(table))
      learning_table.figure_of(runs).savefig(workdir / "learning.png", dpi=110)
      print(learning_table.markdown(table), flush=True)


if __name__ == "__main__":
  flags.DEFINE_list("conditions", list(CONDITIONS), "Conditions to run.")
  flags.DEFINE_list("seeds", ["0", "1"], "Seeds of each condition.")
  flags.DEFINE_integer("steps", 3_200, "Training steps.", lower_bound=1)
  flags.DEFINE_string("workdir", "workdir/learning", "Folder of all runs.")
  app.run(main)
