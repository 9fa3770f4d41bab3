"""Prints training rows and draws their images, or checks all files that training reads.

  cm3leon inspect_data --config=examples/scenes/config.py --workdir=workdir/scenes
  cm3leon inspect_data --config=examples/scenes/config.py --workdir=workdir/scenes \\
    --out=rows.png --first_row=5000 --rows=3
  cm3leon inspect_data --config=examples/scenes/config.py --workdir=workdir/scenes --validate

The rows are the arrays that the trainer reads. The PNG file shows one line of images per row.
--validate prints no rows, but compares every file that training reads and every image of raw/ with
its digest, and names the first error.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Literal

from etils import epath, epy
from PIL import Image
from pydantic import NonNegativeInt, PositiveInt

from cm3leon_jax.commands import common, flag
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.files import atomic
from cm3leon_jax.stages import stages, table

with epy.lazy_imports():
  import numpy as np

  from cm3leon_jax.data.checks import validate as validate_lib
  from cm3leon_jax.reports import row_text
  from cm3leon_jax.retrieval import arrays
  from cm3leon_jax.run import rows
  from cm3leon_jax.run import run as run_lib


DOCUMENTS = ("documents", "neighbors")
READ = (*table.TOKENIZERS, *DOCUMENTS)
ROWS_READ = 2**16  # Number of rows of an array that --validate reads at a time.


@dataclasses.dataclass(frozen=True)
class Flags(flag.Fields):
  out: str | None = None
  """PNG file with the images of the rows (default: rows.png)."""
  rows: PositiveInt = 6
  """Number of rows."""
  first_row: NonNegativeInt = 0
  """Number of the first row."""
  split: Literal["train", "heldout"] = "train"
  """Split of the rows."""
  validate: bool = False
  """Print no rows; compare all files that training reads with their digests."""


def show_rows(
  settings: Settings, workdir: epath.Path, out: epath.Path, split: str, numbers: Sequence[int]
) -> None:
  """Prints the rows `numbers` of `split`, and writes their images to `out`, a PNG file.

  Raises:
    UserError: a stage is missing.
  """
  documents = DOCUMENTS if rows.replay_share(settings, split) else ()
  instructions = ("instructions",) if settings.instructions.any else ()
  for name in (*table.TOKENIZERS, *instructions, *documents):
    stages.require(workdir, name)
  run = run_lib.Run(workdir, settings)
  loader = run.rows(split)
  images: list[Sequence[np.ndarray]] = []
  for number in numbers:
    lines, codes = row_text.describe_row(loader, number, run.text)
    print("\n".join(lines), flush=True)
    # A row that is full may lack the last codes of an image.
    whole = run.images.config.image_tokens
    batch = [np.pad(each, (0, whole - len(each))) for each in codes]
    images.append([*run.images.decode(np.stack(batch))] if batch else [])
  if any(len(row) for row in images):
    with atomic.replacing(out, "wb") as file:
      Image.fromarray(row_text.contact_sheet(images)).save(file, format="png")
    print(f"inspect_data: the images of these rows, one line each: {out}", flush=True)


def validate(settings: Settings, workdir: epath.Path) -> None:
  """Compares all files of a run that training reads with their digests. Prints counts.

  Raises:
    UserError: a stage is not finished, or one of its files is wrong. The message names the file.
  """
  documents = DOCUMENTS if rows.replay_share(settings, "train") else ()
  instructions = ("instructions",) if settings.instructions.any else ()
  for name in (*table.TOKENIZERS, *instructions, *documents):
    described = len(stages.require(workdir, name, files=dict)["files"])
    stages.check_files(workdir / name)
    print(f"{workdir / name}: {described} files as written.")
  for name in (*documents[:1], *instructions):
    validate_lib.validate_stores(workdir / name, settings.vocab)
  for index in (workdir / "neighbors").glob("*/*/index.json") if documents else ():
    array = arrays.ArrayStore(index.parent)
    for start in range(0, len(array), ROWS_READ):
      array[start : start + ROWS_READ]  # Raises UserError if a chunk is damaged.
  if atomic.exists(workdir / "raw" / stages.DONE):
    validate_lib.validate_raw(workdir / "raw", settings.raw.num_threads)
  else:
    print(f"{workdir / 'raw'}: is missing or not finished, so its images were not checked.")


def main(settings: Settings, workdir: epath.Path, flags: Flags) -> None:
  if flags.validate:
    validate(settings, workdir)
    return
  numbers = range(flags.first_row, flags.first_row + flags.rows)
  show_rows(settings, workdir, epath.Path(flags.out or "rows.png"), flags.split, numbers)


if __name__ == "__main__":
  common.run(main, Flags)
