"""Defines the main figures of a run, and lists the figures of every run with retrieval."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Headline:
  """One of the main figures of a run.

  Attributes:
    title: what is measured, with its unit.
    path: dotted path of the figure in the summary.
    better: how a good figure compares with the target: ">=", "<=", ">" or "<".
    target: a number, the dotted path of a number in the summary, or None.
    note: what the target is, e.g. "chance". If the note is "" and the whole interval of the figure
      must meet the target, the report writes "whole interval" instead.
  """

  title: str
  path: str
  better: str
  target: float | str | None
  note: str = ""


# fmt: off
RETRIEVAL = (
  Headline(
    "Recall@2 of the neighbor search against exact search", "neighbors.recall@2", ">=", 0.95),
  Headline(
    "CLIP text-to-image recall@1, held-out concepts", "clip.recall@1", ">", "clip.chance@1",
    "chance"),
  Headline(
    "CLIP text-to-image recall@5, held-out concepts", "clip.recall@5", ">", "clip.chance@5",
    "chance"),
  Headline(
    "Bits per image code, true neighbors", "evaluation.image.true.bits", "<",
    "evaluation.image.unigram", "unigram model"),
)
NEIGHBORS = (
  Headline(
    "True minus shuffled neighbors (bits/code)", "evaluation.image.true_minus_shuffled.bits",
    "<", 0.0),
  Headline(
    "True minus no neighbors (bits/code)", "evaluation.image.true_minus_none.bits",
    "<", 0.0),
)
# fmt: on
