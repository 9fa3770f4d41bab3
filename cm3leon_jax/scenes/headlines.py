"""Defines the headline figures of runs with judged scenes or graded answers to instructions."""

from typing import Any

from cm3leon_jax.evaluation.headlines import NEIGHBORS, RETRIEVAL, Headline

# Headline figures of runs with judged scenes. Shares of samples are those at the best guidance
# weight.
SCENE_HEADLINES = (
  Headline("Reconstructions judged correct", "vqgan.reconstructed_scenes_right", ">=", 0.9),
  Headline(
    "New combinations of known parts, wholly correct",
    "evaluation.scenes.best.scene.share",
    ">=",
    0.75,
  ),
  Headline(
    "New combinations whose claims no training caption makes, wholly correct",
    "evaluation.scenes.best.new_claims.share",
    ">",
    "evaluation.scenes.best.lookup.new_claims",
    "the best training image",
  ),
  Headline(
    "Single objects, wholly correct", "evaluation.scenes.best.single_object.share", ">=", 0.5
  ),
  Headline("Color correct", "evaluation.scenes.best.color.share", ">=", 0.8),
  Headline("Number of objects correct", "evaluation.scenes.best.count.share", ">=", 0.8),
  Headline("Place correct", "evaluation.scenes.best.place.share", ">=", 0.85),
  Headline(
    "Best guidance minus guidance 1, wholly correct", "evaluation.scenes.gain.share", ">=", 0.05
  ),
  *RETRIEVAL,
  *NEIGHBORS,
)
# Headline figures of runs with graded answers to instructions about scenes.
TUNED_HEADLINES = (
  Headline(
    "Answers correct, mean of four kinds of questions", "grades.means.questions.after", ">=", 0.8
  ),
  Headline("Is it there, yes or no: correct", "grades.tasks.exists.after.right.share", ">=", 0.85),
  Headline("Captions wholly correct", "grades.tasks.describe.after.right.share", ">=", 0.65),
  Headline("Edits wholly correct, mean of four kinds", "grades.means.edits.after", ">=", 0.5),
  Headline("Edits that leave all else as it was", "grades.means.edits, kept.after", ">=", 0.8),
  Headline(
    "Images for captions wholly correct, after less before", "grades.gains.draw.share", ">=", -0.03
  ),
)


def headlines(summary: dict[str, Any]) -> tuple[Headline, ...]:
  """Returns the headline figures of a run; see `evaluation.world.World`."""
  if "grades" in summary and "evaluation" not in summary:
    return TUNED_HEADLINES
  scenes = summary.get("evaluation", {}).get("scenes")
  if scenes is None and "reconstructed_scenes_right" not in summary.get("vqgan", {}):
    return ()
  compared = scenes is None or "gain" in scenes  # With one guidance weight, there is no gain.
  return tuple(line for line in SCENE_HEADLINES if compared or ".gain." not in line.path)
