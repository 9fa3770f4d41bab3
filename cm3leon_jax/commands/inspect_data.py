"""Writes an HTML page that shows training rows, or checks all files that training reads.

  cm3leon inspect_data --config=scenes --workdir=workdir/scenes
  cm3leon inspect_data --config=scenes --workdir=workdir/scenes \\
    --out=rows.html --first_row=5000 --rows=3
  cm3leon inspect_data --config=scenes --workdir=workdir/scenes --validate

The page shows the arrays that the trainer reads. The command compares every shown sample with its
documents. --validate writes no page, but reads every record, every row and every image of raw/, and
names the first error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags
from etils import epath
from ml_collections import config_flags

from cm3leon_jax.commands import common
from cm3leon_jax.config import UserError
from cm3leon_jax.files import atomic
from cm3leon_jax.runs import stages, table

if TYPE_CHECKING:
  from cm3leon_jax.settings import Settings

# No default, because other commands also define --out without a default, and tests import all
# commands in one process.
_OUT = flags.DEFINE_string("out", None, "HTML file to write (default: rows.html).")
_ROWS = flags.DEFINE_integer("rows", 6, "Number of rows.", lower_bound=1)
_FIRST_ROW = flags.DEFINE_integer("first_row", 0, "Number of the first row.", lower_bound=0)
_SPLIT = flags.DEFINE_enum("split", "train", ["train", "heldout"], "Split of the rows.")
_VALIDATE = flags.DEFINE_bool(
  "validate",
  False,
  "Write no page; check all files that training reads.",
  allow_override=True,  # encode_documents also defines this flag; tests import both modules.
)

DOCUMENTS = ("documents", "neighbors")
READ = (*table.TOKENIZERS, *DOCUMENTS)


def write_page(
  settings: Settings,
  workdir: epath.Path,
  out: epath.Path,
  split: str,
  numbers: Sequence[int],
  config_name: str,
) -> None:
  """Writes the page for the rows `numbers` of `split`.

  Raises:
    UserError: `out` cannot be written, a stage is missing, or a row does not contain its documents.
  """
  from cm3leon_jax.reports import inspect_page, row_contents
  from cm3leon_jax.retrieval.neighbors import load_neighbors
  from cm3leon_jax.trained.rows import replay_share
  from cm3leon_jax.trained.run import Run

  inspect_page.check_writable(out)
  documents = DOCUMENTS if replay_share(settings, split) else ()
  instructions = ("instructions",) if settings.instructions.any else ()
  for name in (*table.TOKENIZERS, *instructions, *documents):
    stages.require(workdir, name)
  run = Run(workdir, settings)
  loader, scores = run.rows(split), None
  if documents:
    # As in `open_rows`, held-out rows use the neighbors that the caption retrieves.
    folder, by_caption = workdir / "neighbors", split == "heldout"
    scores = load_neighbors(folder, f"{split}_pairs", by_caption, array="scores")
  try:
    rows = [row_contents.read_row(loader, scores, number) for number in numbers]
  except ValueError as error:
    raise UserError(f"the rows differ from their plan: {error}") from error
  decoder = inspect_page.make_decoder(rows, settings.vocab, run.text, run.images)
  with atomic.replacing(out, "w") as file:
    file.write(inspect_page.render(rows, loader.plan, decoder, config_name, split))
  used = f"{inspect_page.fill(rows):.1%} of their positions used"
  samples = f"{sum(len(row.samples) for row in rows)} samples, all checked"
  print(f"inspect_data: {len(rows)} rows, {used}; {samples}: {out}", flush=True)


def validate(settings: Settings, workdir: epath.Path) -> None:
  """Checks digests, documents, neighbors, instructions and raw images of a run. Prints counts.

  Raises:
    UserError: a stage is not finished, or one of its files is wrong. The message names the file and
      the record or row.
  """
  from cm3leon_jax.data.checks.validate import validate_documents, validate_raw, validate_store
  from cm3leon_jax.data.documents.store import DocumentStore
  from cm3leon_jax.data.instructions.samples import read_targets
  from cm3leon_jax.data.instructions.sources import store_name
  from cm3leon_jax.data.instructions.task_files import load_tasks
  from cm3leon_jax.retrieval.neighbors import validate_neighbors
  from cm3leon_jax.trained.rows import replay_share

  documents = DOCUMENTS if replay_share(settings, "train") else ()
  instructions = ("instructions",) if settings.instructions.any else ()
  for name in (*table.TOKENIZERS, *instructions, *documents):
    described = len(stages.require(workdir, name).get("files", {}))
    stages.check_files(workdir / name)
    state = f"{described} files as written" if described else "no digests, from an older version"
    print(f"{workdir / name}: {state}.")
  if documents:
    validate_documents(workdir / "documents", settings.vocab)
    numbers = validate_neighbors(workdir, settings.vocab)
    counts = ", ".join(f"{count:,} {field}" for field, count in numbers.items())
    print(f"{workdir / 'neighbors'}: {counts}; all valid.", flush=True)
  if instructions:
    for task in load_tasks(settings.instructions):
      for split in ("train", "heldout") if task.heldout else ("train",):
        store = DocumentStore(workdir / "instructions" / store_name(split, task), settings.vocab)
        numbers = validate_store(store)
        read_targets(store.folder, len(store))
        print(f"{store.folder}: {numbers['documents']:,} documents; all valid.", flush=True)
  if atomic.exists(workdir / "raw" / stages.DONE):
    validate_raw(workdir / "raw", settings.raw.num_threads)
  else:
    print(f"{workdir / 'raw'}: is missing or not finished, so its images were not checked.")


def main(settings: Settings, workdir: epath.Path) -> None:
  if _VALIDATE.value:
    validate(settings, workdir)
    return
  numbers = range(_FIRST_ROW.value, _FIRST_ROW.value + _ROWS.value)
  name = config_flags.get_config_filename(flags.FLAGS["config"])
  out = epath.Path(_OUT.value or "rows.html")
  write_page(settings, workdir, out, _SPLIT.value, numbers, name)


if __name__ == "__main__":
  common.run(main)
