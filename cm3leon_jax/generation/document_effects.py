"""Shows what retrieved documents change in samples, for `cm3leon explain`."""

from collections.abc import Sequence

import numpy as np

from cm3leon_jax.errors import printable
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.generation.sample import Sample
from cm3leon_jax.generation.tasks import Task
from cm3leon_jax.generation.writer import ORIGIN, Writer, contact_sheet, save_png
from cm3leon_jax.retrieval import removed


def explain(writer: Writer, samples: Sequence[Sequence[Sample]]) -> None:
  """Writes documents and heat maps of each sample with documents, and prints their origins."""
  for sample in [one for of_task in samples for one in of_task if one.neighbors]:
    name = writer.file_names(sample)[0].replace(".png", "_explained.png")
    rows, labels = [], []
    for result in sample.explain():
      rows.append([sample.segments[0], np.asarray(result.image), np.asarray(result.heat_map)])
      origin = [getattr(result.document, field) for field in ORIGIN]
      labels.append(" · ".join(filter(None, [result.caption, *origin])))
      print(f"explain: {name}: {result.squares.sum()} squares by {printable(labels[-1])}")
    sheet = contact_sheet(rows, labels, ["sample", "document", "more likely by it"])
    save_png(writer.folder / name, sheet)


def compare(
  pipeline: Pipeline,
  without: Sequence[str],
  tasks: Sequence[Task],
  samples: Sequence[Sequence[Sample]],
) -> list[str]:
  """Draws the seeds of `samples` again with the documents `without`, which were left out.

  Prints and returns what changes: prompt, sample, seed and number of tokens.
  """
  retrieved = [{removed.image_of(x.key) for x in result} for result in pipeline.retrieve(tasks)]
  gone = {*map(removed.image_of, without)}
  hit = [i for i, images in enumerate(retrieved) if not gone.isdisjoint(images)]
  changed = []
  for i, drawn in zip(hit, pipeline.generate([tasks[i] for i in hit], len(samples[0]))):
    after = {sample.index: sample.tokens for sample in samples[i]}
    for x in drawn:
      if count := count_changed(x.tokens, after[x.index]):
        of = max(len(x.tokens), len(after[x.index]))
        name = f"{x.task.prompt}, sample {x.index}, seed {x.seed}"
        changed.append(f"{name}: {count} of {of} tokens")
  total = f"{len(changed)} of {sum(map(len, samples))} samples change"
  title = f"explain: without {', '.join(without)}, {total}{':' if changed else '.'}"
  print("\n  ".join([title, *map(printable, changed)]))
  return changed


def count_changed(before: np.ndarray, after: np.ndarray) -> int:
  """Counts the places at which two lists of token ids differ: [5 6 7], [5 8] give 2."""
  shared = min(len(before), len(after))
  return max(len(before), len(after)) - int((before[:shared] == after[:shared]).sum())
