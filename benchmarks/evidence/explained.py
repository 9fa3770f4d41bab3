"""Measures whether explanations name the squares that a sample copies from a retrieved document.

  python -m benchmarks.evidence.explained --workdir=workdir/illustrations --captions=200

A copy is a block of at least 3 x 3 codes, not all of them equal, that the image of the document
also has, at any place. The squares that `Sample.explain` names are compared with the squares whose
code the document has at the same place, with those that the same explanation would name by chance
(the squares of another sample), and with all squares. Precision is the share of the named squares
that are in a copy, recall the share of the copied squares that are named; their intervals are over
captions. Prompts are held-out captions or, for a bundle, captions of its bank. Writes table.md,
results.json and sheet.png to the folder --results.
"""

from collections.abc import Sequence
import pathlib

from absl import app, flags
import numpy as np

from benchmarks.evidence import experiment
from cm3leon_jax import CM3Leon
from cm3leon_jax.data.documents.store import DocumentStore
from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation import intervals
from cm3leon_jax.generation import explanation
from cm3leon_jax.generation.explanation import Influence
from cm3leon_jax.generation.sample import Sample
from cm3leon_jax.generation.writer import contact_sheet, save_png

SIDE = 3  # Smallest side of a copied block, in codes.
LEASTS = (0.5, explanation.LEAST, 2.0, 3.0)  # Log-ratios from which a square is named.
PLACE, CHANCE, EVERY = "equal code at the same place", "squares of another sample", "every square"
SHOWN = 12  # Samples on the sheet.


def copied(codes: np.ndarray, document: np.ndarray) -> np.ndarray:
  """Marks the codes [K, K] that are in a block of SIDE x SIDE codes of the document, [K, K] bool.

  Blocks whose codes are all equal, such as blocks of the background, do not count.
  """
  blocks, others = (
    np.lib.stride_tricks.sliding_window_view(x, (SIDE, SIDE)).reshape(-1, SIDE * SIDE)
    for x in (codes, document)
  )
  known = {tuple(block) for block in others.tolist()}
  found, across = np.zeros(codes.shape, bool), codes.shape[1] - SIDE + 1
  for i, block in enumerate(blocks.tolist()):
    if len({*block}) > 1 and tuple(block) in known:
      found[i // across :, i % across :][:SIDE, :SIDE] = True
  return found


def measured(named: Sequence[np.ndarray], truth: Sequence[np.ndarray], groups: np.ndarray) -> dict:
  """Returns precision, recall and the share of squares that are named, with intervals."""
  right = np.array([(a & b).sum() for a, b in zip(named, truth)])
  found: dict = {"named": float(np.mean(named))}
  for name, squares in (("precision", named), ("recall", truth)):
    counts = np.array([x.sum() for x in squares])
    some = counts > 0
    parts = right[some], counts[some], groups[some]
    found[name] = intervals.mean_interval(*parts) if some.any() else None
  return found


def rows_of(
  model: CM3Leon, samples: Sequence[Sample], influences: Sequence[list[Influence]]
) -> tuple[dict[str, dict], dict]:
  """Returns the figures of each row of the table, and the counts of samples and copies."""
  vocab, side = model.run.settings.vocab, model.pipeline.layout.side
  codes, documents, ratios, groups = [], [], [], []
  for i, (sample, found) in enumerate(zip(samples, influences)):
    for one in found:
      codes.append(sample.codes[0].reshape(side, side))
      documents.append(vocab.image_codes(one.document.segments[1].tokens).reshape(side, side))
      ratios.append(one.ratios)
      groups.append(i)
  truth = [copied(*pair) for pair in zip(codes, documents)]
  squares = np.array(ratios) >= explanation.LEAST
  named = {f"explanation, log-ratio >= {least:g}": np.array(ratios) >= least for least in LEASTS}
  named[PLACE] = np.array(codes) == np.array(documents)
  named[CHANCE] = np.roll(squares, 1, axis=0)
  named[EVERY] = np.ones_like(squares)
  rows = {name: measured(some, truth, np.array(groups)) for name, some in named.items()}
  copies = int(np.any(truth, (1, 2)).sum())
  return rows, {"samples": len(samples), "documents": len(truth), "with_copies": copies}


def table(rows: dict[str, dict], about: dict) -> str:
  """Formats the figures as Markdown."""

  def share(found: dict | None) -> str:
    return intervals.describe_share(found and {**found, "share": found["mean"]})

  lines = ["| squares | precision | recall | named |", "|---|---|---|---|"]
  for name, row in rows.items():
    parts = [share(row["precision"]), share(row["recall"]), f"{row['named']:.1%}"]
    lines.append(f"| {' | '.join([name, *parts])} |")
  return "\n".join(
    [
      *lines,
      "",
      f"{about['samples']} samples with {about['documents']} retrieved documents, "
      f"{about['with_copies']} of which have a copied block of {SIDE} x {SIDE} codes or more.",
    ]
  )


def captions(model: CM3Leon, count: int) -> list[str]:
  """Returns evenly spaced held-out captions or, for a bundle, captions of its bank."""
  store = model.pipeline.documents
  if model.run.kind == "workdir":
    folder = model.run.folder / "documents" / "heldout_pairs"
    store = DocumentStore(folder, model.run.settings.vocab)
  chosen = np.linspace(0, len(store) - 1, min(count, len(store))).astype(int)
  return [model.pipeline.layout.decode(store[int(i)].segments[0].tokens) for i in chosen]


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise UserError(f"unexpected argument '{argv[1]}': this command takes flags only.")
  given = flags.FLAGS
  model = CM3Leon.load(given.workdir, batch_size=32)
  folder = pathlib.Path(given.results or pathlib.Path(given.workdir) / "explained")
  folder.mkdir(parents=True, exist_ok=True)
  retrieve = given.retrieve or model.pipeline.usual_retrieve
  prompts = captions(model, given.captions)
  drawn = model.generate(prompts, retrieve=retrieve, seed=given.seed)
  samples = [sample for [sample] in drawn if sample.neighbors]
  influences = [sample.explain() for sample in samples]
  rows, about = rows_of(model, samples, influences)
  text = table(rows, about)
  print(text, flush=True)
  firsts = [(s, found[0]) for s, found in zip(samples[:SHOWN], influences)]
  shown = [[s.segments[0], np.asarray(x.image), np.asarray(x.heat_map)] for s, x in firsts]
  labels = [sample.task.prompt for sample, _ in firsts]
  titles = ["sample", "document", "more likely by it"]
  save_png(folder / "sheet.png", contact_sheet(shown, labels, titles))
  about |= {"step": model.step, "seed": given.seed, "retrieve": retrieve}
  experiment.write_results(folder, {**about, "rows": rows}, text + "\n")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "workdir/illustrations", "Workdir of a run, or a bundle.")
  flags.DEFINE_string("results", "", "Folder of the results; default: explained/ in --workdir.")
  flags.DEFINE_integer("captions", 200, "Number of captions.", 2)
  flags.DEFINE_integer("retrieve", 0, "Retrieved documents; 0: as many as in training.", 0)
  flags.DEFINE_integer("seed", 0, "Seed of the first caption.", 0)
  app.run(main)
