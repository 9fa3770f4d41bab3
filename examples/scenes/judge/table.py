"""Computes tables of judged scenes by category and by the reason why they are held out.

Also writes results in GenEval's layout.
"""

# n images.

from collections.abc import Sequence
import dataclasses
import json

import numpy as np
import numpy.typing as npt

from cm3leon_jax.evaluation import intervals
from examples.scenes import world
from examples.scenes.judge.baselines import Known
from examples.scenes.judge.facts import FACTS, SceneVerdict
from examples.scenes.options import CATEGORIES

MEASURES = ("correct", *FACTS)
LOOKUP = "lookup"
COLUMNS = ("correct", LOOKUP, *FACTS)
NEW_CLAIMS = "scene, new claims"
PARTS = (NEW_CLAIMS, "scene, claims of training", "pair, color named", "pair, no color named")


@dataclasses.dataclass(frozen=True)
class Judged:
  """Image with the verdict of the judge.

  Attributes:
    concept: images of one concept show the same scene. "" means that no other image shows the
      scene.
    known: what training has in common with the caption; None if unknown.
  """

  prompt: str
  facts: dict
  concept: str
  verdict: SceneVerdict
  known: Known | None = None

  @property
  def parts(self) -> list[str]:
    """Names of the rows in the entry "parts" of a table that count this image."""
    kind, result = self.facts["heldout"], []
    if self.known is not None and kind == "scene":
      result.append(NEW_CLAIMS if not self.known.claims else "scene, claims of training")
    if kind == "pair":
      named = any("color" in clause for clause in self.facts["include"])
      result.append("pair, color named" if named else "pair, no color named")
    return result


def table(judged: Sequence[Judged], num_resamples: int, seed: int = 0) -> dict:
  """Computes the shares of images whose facts hold, with 95% confidence intervals over scenes.

  Returns:
    {"all": row, "tag": {category: row}, "heldout": {reason: row}, "parts": {one of PARTS: row},
    "geneval": mean over categories of the share of correct images}. A row has these entries:
    - `images`: the number of images.
    - `more`, `fewer`: shares of images with more or fewer objects than their captions name.
    - `correct`, `object`, `color`, `count`, `place`: {share, low, high, groups, effective_groups}
      over the images whose captions name such a fact. Absent if there are no such images.
    - `lookup`: a dict with the same fields, for the share of captions for which a training image is
      correct (`baselines.Known.image`).
  """

  def row(some: Sequence[Judged]) -> dict:
    extra = np.array([_extra_objects(one) for one in some])
    counts = {"more": float(np.mean(extra > 0)), "fewer": float(np.mean(extra < 0))}
    return {"images": len(some), **counts, **_shares(some, num_resamples, seed)}

  result: dict = {"all": row(judged)}
  for field, order in (("tag", CATEGORIES), ("heldout", world.KINDS)):
    values = {one.facts[field] for one in judged}
    result[field] = {
      value: row([one for one in judged if one.facts[field] == value])
      for value in (*order, *sorted(values.difference(order)))
      if value in values
    }
  result["parts"] = {
    part: row([one for one in judged if part in one.parts])
    for part in PARTS
    if any(part in one.parts for one in judged)
  }
  result["geneval"] = float(np.mean([r["correct"]["share"] for r in result["tag"].values()]))
  return result


def _extra_objects(one: Judged) -> int:
  """Returns the number of objects in an image minus the number of objects in its caption."""
  return len(one.verdict.found) - sum(clause["count"] for clause in one.facts["include"])


def _shares(judged: Sequence[Judged], num_resamples: int, seed: int) -> dict:
  """Computes the measures of a row of `table`."""
  result = {}
  for measure in MEASURES:
    values = [
      (one, one.verdict.correct if measure == "correct" else one.verdict.holds[measure])
      for one in judged
      if measure == "correct" or measure in one.verdict.holds
    ]
    if values:
      ones, holds = zip(*values)
      result[measure] = _mean_share(ones, holds, num_resamples, seed)
  if known := [one for one in judged if one.known is not None]:
    found = [has.image for one in known if (has := one.known) is not None]
    result[LOOKUP] = _mean_share(known, found, num_resamples, seed)
  return result


def _mean_share(
  judged: Sequence[Judged], values: npt.ArrayLike, num_resamples: int, seed: int
) -> dict:
  """Averages one value per image. Returns {share, low, high, groups, effective_groups}."""
  groups = [one.concept or f"image {i}" for i, one in enumerate(judged)]
  values = np.asarray(values, np.float64)
  interval = intervals.mean_interval(values, np.ones(len(values)), groups, num_resamples, seed)
  return {"share": interval.pop("mean"), **interval}


def gain(
  judged: Sequence[Judged], base: Sequence[Judged], num_resamples: int, seed: int = 0
) -> dict:
  """Computes the share of correct images in `judged` minus the share in `base`.

  Both have images for the same captions in the same order. Returns {share, low, high, groups,
  effective_groups} of the paired difference.
  """
  values = [one.verdict.correct - other.verdict.correct for one, other in zip(judged, base)]
  return _mean_share(judged, values, num_resamples, seed)


def describe(tables: dict[str, dict]) -> str:
  """Formats tables as text. `tables` maps a title (e.g. "guidance 1") to a result of `table`."""
  width = max(len(label) for table in tables.values() for label, _ in rows(table)) + 2
  lines = []
  for title, table in tables.items():
    of_all, mean = table["all"], table["geneval"]
    lines.append(
      f"{title}: {of_all['images']} images, mean of the categories {mean:.1%} correct; "
      f"{of_all['more']:.1%} show more objects than requested, {of_all['fewer']:.1%} fewer"
    )
    lines.append(" " * width + "images  " + "".join(f"{m:<23}" for m in COLUMNS).rstrip())
    for label, row in rows(table):
      cells = "".join(f"{intervals.describe_share(row.get(m)):<23}" for m in COLUMNS).rstrip()
      lines.append(f"{label:<{width}}{row['images']:>6}  {cells}")
  return "\n".join(lines)


def rows(table: dict) -> list[tuple[str, dict]]:
  """Returns (label, row) for each row of a table: all, categories, held-out reasons, parts."""
  kinds = {**table["heldout"], **table.get("parts", {})}.items()
  labeled = [(f"held-out: {kind or 'no'}", row) for kind, row in kinds]
  return [("all", table["all"]), *table["tag"].items(), *labeled]


def geneval_metadata(prompt: str, facts: dict) -> dict:
  """Returns the fields of a caption's line in GenEval's evaluation_metadata.jsonl."""
  fields = {name: facts[name] for name in ("tag", "include", "exclude") if name in facts}
  return {**fields, "prompt": prompt}


def geneval_result(filename: str, one: Judged) -> dict:
  """Returns the fields of an image's line in GenEval's results (written by evaluate_images.py).

  `details` is a JSON text: class -> boxes of the found objects, each with its score.
  """
  boxes: dict = {}
  for thing in one.verdict.found:
    boxes.setdefault(thing.name, []).append([*thing.box, thing.score])
  return {
    "filename": filename,
    "tag": one.facts["tag"],
    "prompt": one.prompt,
    "correct": one.verdict.correct,
    "reason": one.verdict.reason,
    "metadata": json.dumps(geneval_metadata(one.prompt, one.facts)),
    "details": json.dumps(boxes),
  }
