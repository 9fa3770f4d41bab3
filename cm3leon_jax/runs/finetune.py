"""Tunes a base on a folder, on pairs, or on instruction records, by running `cm3leon run`.

`CM3Leon.finetune` calls this module. Given pairs and records are written to the workdir first, so
that the command reads them like any other data and can be repeated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import hashlib
import io
import itertools
import json
from math import inf
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from scipy import sparse

from cm3leon_jax.config import UserError
from cm3leon_jax.files.images import upright_rgb
from cm3leon_jax.files.json_files import read_json, write_json

GIVEN = "given"  # Folder in the workdir with the pairs or records that were given.
HELDOUT = 15  # One of this many groups of records is held out, see `_groups`.
QUESTION = "Question: {question} Answer: {answer}. <break> {image}"
EDIT = (
  "Edit first image following the instruction <break> {before} <break> {instruction} "
  "<break> {after}"
)


class Kind(NamedTuple):
  """A kind of records: names of their images and texts, their template, and what is predicted."""

  images: tuple[str, ...]
  texts: tuple[str, ...]
  template: str
  target: str


KINDS = {
  "questions": Kind(("image",), ("question", "answer"), QUESTION, "answer"),
  "edits": Kind(("before", "after"), ("instruction",), EDIT, "after"),
}
SHAPES = (
  "a folder, a list of pairs (image, caption), or a list of records, which are dicts with the keys "
  + " or ".join("/".join((*kind.images, *kind.texts)) for kind in KINDS.values())
)


def run(
  data: Any,
  workdir: str | os.PathLike[str],
  base: str | os.PathLike[str],
  *,
  minutes: float = 10.0,
  tokenizer: Literal["base", "own"] = "base",
  max_forgetting: float = 0.0,
  min_psnr: float | None = None,
  max_color_difference: float | None = None,
  fields: Mapping[str, Any] | None = None,
  show_progress: bool | None = None,
) -> None:
  """Runs all stages of a tuning; the same call continues a run that was stopped.

  Args:
    data: a folder, pairs or records, see `CM3Leon.finetune`.
    base: workdir of a run, folder of a bundle, or name of an installed bundle.
    minutes: time that all stages may take on two CPU cores.
    tokenizer: "base" keeps the image tokenizer of the base, and stops if it reconstructs the images
      worse than the two limits below. "own" trains one; the decoder then forgets the images of the
      base.
    max_forgetting: ends the training when the loss of held-out documents of the base has risen by
      more than this share; 0: no limit.
    min_psnr: the least mean PSNR in dB of the worse of background and drawing; None: 15 dB.
    max_color_difference: the largest mean difference of color in CIE Lab; None: 9; 0: any.
    fields: config fields and their values, such as {"train.steps": 500}.
    show_progress: whether to print a line for each stage that ends; None: yes.

  Raises:
    UserError: the data has another form, the workdir has other data, or a stage raised the error.
  """
  if tokenizer not in ("base", "own"):
    raise UserError(f"tokenizer is {tokenizer!r}; it must be 'base' or 'own'.")
  if isinstance(minutes, bool) or not isinstance(minutes, int | float) or not 0 < minutes < inf:
    raise UserError(f"minutes is {minutes!r}; it must be a positive number.")
  if not isinstance(fields or {}, Mapping):
    raise UserError('fields is not a dict; it must be one, such as {"train.steps": 500}.')
  folder = pathlib.Path(os.path.expanduser(workdir))
  if folder.exists() and not folder.is_dir():
    raise UserError(f"workdir is {folder}, which is a file; it must be a folder.")
  values = {**_source(data, folder), "train.max_forgetting": max_forgetting, **(fields or {})}
  flags = [f"--config=own:{minutes:g}", f"--workdir={folder}", f"--init_from={os.fspath(base)}"]
  flags += [f"--config.{name}={value}" for name, value in values.items()]
  flags += ["--own_image_tokenizer"] if tokenizer == "own" else []
  limits = {"min_psnr": min_psnr, "max_color_difference": max_color_difference}
  flags += [f"--{name}={value}" for name, value in limits.items() if value is not None]
  _start(flags, show_progress is not False)


def _source(data: Any, workdir: pathlib.Path) -> dict[str, str]:
  """Returns the config fields that name the data. Writes pairs and records to the workdir."""
  if isinstance(data, str | os.PathLike):
    if not os.path.exists(data := os.path.expanduser(data)):
      raise UserError(f"data is {data!r}, which does not exist: give {SHAPES}.")
    return {"raw.source": data}
  items = list(data) if isinstance(data, Sequence) else []
  if items and all(isinstance(item, Mapping) for item in items):
    kind = next((k for k, of in KINDS.items() if {*of.images, *of.texts} <= {*items[0]}), "")
    if kind:
      return _write_records(items, kind, workdir / GIVEN)
  elif items and all(isinstance(item, tuple | list) and len(item) in (2, 3) for item in items):
    return _write_pairs(items, workdir / GIVEN)
  types = dict.fromkeys(type(item).__name__ for item in items)
  found = f"of type {type(data).__name__}"
  if isinstance(data, Sequence):
    found = f"a list of {' and '.join(types)}" if types else "an empty list"
  raise UserError(f"data is {found}; it must be {SHAPES}.")


def _png(image: Any, where: str) -> bytes:
  """Returns an image as an RGB PNG file. `image` is a path, a PIL image or uint8 [H, W, 3]."""
  buffer = io.BytesIO()
  try:
    if isinstance(image, str | os.PathLike):
      with Image.open(os.path.expanduser(image)) as opened:
        upright_rgb(opened).save(buffer, "PNG")
    else:
      given = image if isinstance(image, Image.Image) else Image.fromarray(image)
      upright_rgb(given).save(buffer, "PNG")
  except Exception as error:  # Pillow raises errors of many types for damaged files.
    raise UserError(
      f"{where}: the image cannot be read ({error}); it must be the path of an image file, a PIL "
      "image or an array uint8 [H, W, 3]."
    ) from error
  return buffer.getvalue()


def _write_pairs(pairs: Sequence[Any], folder: pathlib.Path) -> dict[str, str]:
  """Writes pairs (image, caption), or (image, caption, concept)."""
  lines, images = [], {}
  for number, (image, *texts) in enumerate(pairs):
    for title, text in zip(("caption", "concept"), texts):
      if not isinstance(text, str):
        kind = type(text).__name__
        raise UserError(f"data[{number}]: the {title} is of type {kind}; it must be a text.")
    name = f"{number:06}.png"
    images[name] = _png(image, f"data[{number}]")
    given = dict(zip(("caption", "concept"), texts))
    lines.append(json.dumps({"key": f"{number:06}", "image": name, **given}))
  _write_folder(folder, {"pairs.jsonl": lines}, images)
  return {"raw.source": str(folder)}


def _groups(records: Sequence[Sequence[str]]) -> list[int]:
  """Numbers groups of records that share an image, also through other records.

  _groups([["a", "b"], ["c", "d"], ["b", "e"]]) = [0, 1, 0]
  """
  places = {name: i for i, name in enumerate(dict.fromkeys(itertools.chain(*records)))}
  edges = np.array([(places[names[0]], places[name]) for names in records for name in names])
  shared = sparse.coo_array((np.ones(len(edges)), edges.T), (len(places),) * 2)
  groups = sparse.csgraph.connected_components(shared, directed=False)[1]
  return [int(groups[places[names[0]]]) for names in records]


def _write_records(records: Sequence[Any], kind: str, folder: pathlib.Path) -> dict[str, str]:
  """Writes records and their task. All records of a group are in one split."""
  image_names, text_names, template, target = KINDS[kind]
  splits: dict[str, list[str]] = {"train": [], "heldout": []}
  images: dict[str, bytes] = {}
  lines: list[dict[str, Any]] = []
  for number, record in enumerate(records):
    if missing := [name for name in (*image_names, *text_names) if name not in record]:
      raise UserError(f"data[{number}] has no {missing[0]!r}, but data[0] has it.")
    texts = {name: record[name] for name in text_names}
    if wrong := [name for name, text in texts.items() if not isinstance(text, str)]:
      raise UserError(f"data[{number}]: {wrong[0]} is not a text.")
    names = {}
    for name in image_names:
      png = _png(record[name], f"data[{number}]")
      names[name] = f"{hashlib.sha256(png).hexdigest()[:16]}.png"
      images[names[name]] = png
    lines.append({"key": f"{number:06}", "texts": texts, "images": names})
  groups = _groups([[line["images"][name] for name in image_names] for line in lines])
  if (count := len(set(groups))) < HELDOUT:
    raise UserError(
      f"data has {count} group{'s' * (count > 1)} of records; it must have at least {HELDOUT}, "
      f"because one of {HELDOUT} is held out. Records that share an image are in one group: add "
      "records with other images."
    )
  for line, group in zip(lines, groups):
    split = "heldout" if group % HELDOUT == HELDOUT - 1 else "train"
    splits[split].append(json.dumps({**line, "group": f"{group:06}"}))
  task = {"name": kind, "format": "jsonl", "templates": [template], "target": target}
  task["heldout"] = "heldout"
  files = {f"{split}.jsonl": lines for split, lines in splits.items()}
  _write_folder(folder, {**files, "tasks.yaml": [json.dumps([task])]}, images)  # JSON is also YAML.
  return {"instructions.tasks": str(folder / "tasks.yaml"), "instructions.root": str(folder)}


def _write_folder(
  folder: pathlib.Path, files: dict[str, list[str]], images: dict[str, bytes]
) -> None:
  """Writes files of lines and images. Does nothing if `folder` already has the same content."""
  digest = hashlib.sha256(json.dumps(files).encode())
  for name in sorted(images):
    digest.update(hashlib.sha256(images[name]).digest())
  about, found = folder / "digest.json", digest.hexdigest()
  if about.exists():
    if read_json(about, {"sha256": str})["sha256"] != found:
      raise UserError(f"{folder} has the data of another call: use another workdir.")
    return
  folder.mkdir(parents=True, exist_ok=True)
  for name, png in images.items():
    (folder / name).write_bytes(png)
  for name, lines in files.items():
    (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
  write_json(about, {"sha256": found})  # The folder is complete when it has this file.


def _output_lines(process: subprocess.Popen[str]) -> Iterator[str]:
  """Yields the output lines of a process. At Ctrl-C, lets the process save and stop first."""
  try:
    for line in process.stdout or ():
      yield line.rstrip("\n")
  except KeyboardInterrupt:
    process.send_signal(signal.SIGINT)
    rest = process.communicate()[0]
    print(rest, end="", flush=True)
    raise


def _start(flags: list[str], show_progress: bool) -> None:
  """Runs `cm3leon run`. Raises UserError with its message if it fails."""
  process = subprocess.Popen(
    [sys.executable, "-m", "cm3leon_jax", "run", *flags], start_new_session=True, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace",
    env={**os.environ, "PYTHONUNBUFFERED": "1"},
  )  # fmt: skip
  last = ""
  with process:
    for line in _output_lines(process):
      last = line or last
      if show_progress and not line.startswith("error: "):
        print(line, flush=True)
  if process.returncode and last.startswith("error: "):
    raise UserError(last.removeprefix("error: "))
  if process.returncode:
    raise UserError(
      f"`cm3leon run` ended with exit code {process.returncode} without an error message; logs/ in "
      f"the workdir has the output of each stage. Its last line: {last or '(none)'}"
    )
