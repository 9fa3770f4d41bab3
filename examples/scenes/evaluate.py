"""Tables of judged scenes by the kinds of facts, with baselines, and the demo's headline figures.

  python -m examples.scenes.evaluate --config=examples/scenes/config.py --workdir=workdir/scenes

`cm3leon evaluate` has judged the images before. This script compares their facts with those of the
training documents, and writes evaluation/scenes.json and scenes_results.jsonl (the results of
GenEval). `cm3leon report` then shows the headline figures, which it writes to judged.json.
"""

# n images, H height, W width.

from __future__ import annotations

import json
from typing import Any

from etils import epath
import numpy as np
from PIL import Image

from cm3leon_jax.commands import common
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.data.documents.store import DocumentStore
from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation import intervals, judged
from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.files.json_files import read_json_lines, write_json
from cm3leon_jax.tokenizers.text import TextTokenizer
from examples.scenes import drawings, headlines
from examples.scenes.judge import errors, judge
from examples.scenes.judge import table as scene_table
from examples.scenes.judge.baselines import TrainingScenes
from examples.scenes.judge.table import Judged
from examples.scenes.options import Style
from examples.scenes.world import Placed, Scene

# Titles of the two tables whose shares are upper bounds for the samples.
REAL, RECONSTRUCTED = "real images", judged.RECONSTRUCTED
UNGUIDED = "guidance 1"


def real_image(facts: dict, style: Style = "filled") -> np.ndarray:
  """Renders the image that the facts of a document describe: [H, W, 3] uint8."""
  placed = [Placed(thing["class"], thing["color"], thing["place"]) for thing in facts["objects"]]
  return drawings.render(Scene.of(placed), style)


def evaluate(folder: epath.Path, trained: TrainingScenes, num_resamples: int, seed: int) -> dict:
  """Computes the tables of an evaluation, and writes scenes.json and scenes_results.jsonl.

  Args:
    folder: folder of the evaluation, with judged.jsonl and its images.
    trained: scenes of the training documents, for the baseline `lookup`.

  Returns:
    A dict with these entries:
    - "judge": result of `errors.measure`.
    - "tables": {title: result of `table.table`}. Titles are "real images", "reconstructions", and
      a title per guidance weight, e.g. "guidance 1.5".
    - "gain", if one of several weights is 1: `table.gain` of the best other weight over weight 1,
      and the title of the best other weight as "title".
  """
  lines = read_json_lines(folder / judged.LINES)
  images: dict[str, list[np.ndarray]] = {}
  for line in lines:
    with Image.open(folder / line["file"]) as image:
      images.setdefault(line["title"], []).append(np.asarray(image))
  titles, first = list(images), lines[: len(images[RECONSTRUCTED])]
  facts = [line["facts"] for line in first]
  real = np.stack([real_image(one) for one in facts])
  known = [trained.known(line["prompt"], line["facts"]) for line in first]
  found = {}
  for title, some in {REAL: list(real), **images}.items():
    verdicts = judge.judge_all(np.stack(some), facts)
    found[title] = [
      Judged(line["prompt"], line["facts"], line["concept"], verdict, has)
      for line, verdict, has in zip(first, verdicts, known)
    ]
  tables = {title: scene_table.table(some, num_resamples, seed) for title, some in found.items()}
  result: dict[str, Any] = {"judge": errors.measure(real, facts, seed), "tables": tables}
  weights = [title for title in titles if title != RECONSTRUCTED]
  if UNGUIDED in weights and len(weights) > 1:
    title = best_guidance({name: tables[name] for name in weights if name != UNGUIDED})
    gain = scene_table.gain(found[title], found[UNGUIDED], num_resamples, seed)
    result["gain"] = {"title": title, **gain}
  with replacing(folder / "scenes_results.jsonl", "w") as file:
    for line, one in zip(lines, (one for title in titles for one in found[title])):
      file.write(json.dumps(scene_table.geneval_result(line["file"], one)) + "\n")
  write_json(folder / "scenes.json", result)
  return result


def best_guidance(tables: dict[str, dict]) -> str:
  """Returns the title of the guidance weight with the most correct images; the first in a tie."""
  weights = [title for title in tables if title not in (REAL, RECONSTRUCTED)]
  return max(weights, key=lambda title: tables[title]["all"]["correct"]["share"])


def describe(result: dict) -> str:
  """Formats the result of `evaluate` as text."""
  lines = [scene_table.describe(result["tables"])]
  if gain := result.get("gain"):
    lines.append(f"{gain['title']} minus {UNGUIDED}: {intervals.describe_share(gain)} correct")
  return "\n".join([*lines, f"judge, on real images: {errors.describe(result['judge'])}"])


def figures_of(result: dict) -> list[dict]:
  """Returns the headline figures of a result of `evaluate`, see `headlines.figure`."""
  tables = result["tables"]
  best = tables[best_guidance(tables)]
  new, of_all = best["parts"].get(scene_table.NEW_CLAIMS), best["all"]

  def of(rows: dict, name: str) -> dict | None:
    return rows.get(name, {}).get("correct")

  # How much a decoder learns depends on the steps that fit into the minutes, so only the image
  # tokenizer and the best training image set targets.
  found: list[tuple] = [
    ("Reconstructions judged correct", tables[RECONSTRUCTED]["all"]["correct"], 0.9),
    ("New combinations of known parts, wholly correct", of(best["heldout"], "scene")),
    (
      "New combinations whose claims no training caption makes, wholly correct (target: the best "
      "training image)",
      new and new["correct"],
      new and new[scene_table.LOOKUP]["share"],
    ),
    ("Single objects, wholly correct", of(best["tag"], "single_object")),
    ("Two objects in two colors, wholly correct", of(best["tag"], "color_attr")),
    ("Color correct", of_all.get("color")),
    ("Number of objects correct", of_all.get("count")),
    ("Place correct", of_all.get("place")),
    ("Best guidance minus guidance 1, wholly correct", result.get("gain")),
  ]
  return [headlines.figure(*one) for one in found if one[1]]


def main(settings: Settings, workdir: epath.Path) -> None:
  folder = workdir / "evaluation"
  if not (folder / judged.LINES).exists():
    raise UserError(
      f"{folder / judged.LINES} does not exist: run `cm3leon evaluate` with the same --config and "
      "--workdir first."
    )
  decode = TextTokenizer(workdir / "text_tokenizer", settings.vocab).decode
  store = DocumentStore(workdir / "documents" / "train_pairs", settings.vocab)
  trained = TrainingScenes.of_store(store, decode)
  result = evaluate(folder, trained, settings.evaluation.num_resamples, settings.seed)
  print(describe(result))
  headlines.write(workdir, figures_of(result))


if __name__ == "__main__":
  common.run(main)
