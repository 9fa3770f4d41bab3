"""Tunes a base on a folder, on pairs, or on instruction records, by running `cm3leon run`.

`CM3Leon.finetune` calls this module. Given pairs and records are written to the workdir first, so
that the command reads them like any other data and can be repeated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import hashlib
import io
import json
from math import inf
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any, Literal

from PIL import Image

from cm3leon_jax.config import UserError
from cm3leon_jax.files.json_files import read_json, write_json

GIVEN = "given"  # Folder in the workdir with the pairs or records that were given.
HELDOUT = 15  # One of this many images is held out.
QUESTION = "Question: {question} Answer: {answer}. <break> {image}"
EDIT = (
  "Edit first image following the instruction <break> {before} <break> {instruction} "
  "<break> {after}"
)
# Names of the images and texts of a record, the template, and the field that the model predicts.
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str, str]] = {
  "questions": (("image",), ("question", "answer"), QUESTION, "answer"),
  "edits": (("before", "after"), ("instruction",), EDIT, "after"),
}
SHAPES = (
  "a folder, a list of pairs (image, caption), or a list of records, which are dicts with the keys "
  + " or ".join("/".join((*images, *texts)) for images, texts, _, _ in KINDS.values())
)


def run(
  data: Any,
  workdir: str | os.PathLike[str],
  base: str | os.PathLike[str],
  *,
  minutes: float = 10.0,
  tokenizer: Literal["base", "own"] = "base",
  max_forgetting: float = 0.0,
  fields: Mapping[str, Any] | None = None,
  show_progress: bool | None = None,
) -> None:
  """Runs all stages of a tuning; the same call continues a run that was stopped.

  Args:
    data: a folder, pairs or records, see `CM3Leon.finetune`.
    base: workdir of a run, folder of a bundle, or name of an installed bundle.
    minutes: time that all stages may take on two CPU cores.
    tokenizer: "base" keeps the image tokenizer of the base, and stops if it reconstructs the images
      with less than 20 dB. "own" trains one; the decoder then forgets the images of the base.
    max_forgetting: ends the training when the loss of held-out documents of the base has risen by
      more than this share; 0: no limit.
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
  folder = pathlib.Path(workdir)
  if folder.exists() and not folder.is_dir():
    raise UserError(f"workdir is {folder}, which is a file; it must be a folder.")
  values = {**_source(data, folder), "train.max_forgetting": max_forgetting, **(fields or {})}
  flags = [f"--config=own:{minutes:g}", f"--workdir={folder}", f"--init_from={os.fspath(base)}"]
  flags += [f"--config.{name}={value}" for name, value in values.items()]
  flags += ["--own_image_tokenizer"] if tokenizer == "own" else []
  _start(flags, show_progress is not False)


def _source(data: Any, workdir: pathlib.Path) -> dict[str, str]:
  """Returns the config fields that name the data. Writes pairs and records to the workdir."""
  if isinstance(data, str | os.PathLike):
    if not os.path.exists(data):
      raise UserError(f"data is {os.fspath(data)!r}, which does not exist: give {SHAPES}.")
    return {"raw.source": os.fspath(data)}
  items = list(data) if isinstance(data, Sequence) else []
  if items and all(isinstance(item, Mapping) for item in items):
    kind = next((k for k, v in KINDS.items() if {*v[0], *v[1]} <= {*items[0]}), "")
    if kind:
      return _write_records(items, kind, workdir / GIVEN)
  elif items and all(isinstance(item, tuple | list) and len(item) == 2 for item in items):
    return _write_pairs(items, workdir / GIVEN)
  kinds = [type(item).__name__ for item in items]
  found = f"of type {type(data).__name__}"
  if isinstance(data, Sequence):
    found = f"a list of {' and '.join(dict.fromkeys(kinds))}" if kinds else "an empty list"
  raise UserError(f"data is {found}; it must be {SHAPES}.")


def _png(image: Any, where: str) -> bytes:
  """Returns an image as a PNG file. `image` is a path, a PIL image or uint8 [H, W, 3]."""
  buffer = io.BytesIO()
  try:
    if isinstance(image, str | os.PathLike):
      with Image.open(image) as opened:
        opened.convert("RGB").save(buffer, "PNG")
    else:
      given = image if isinstance(image, Image.Image) else Image.fromarray(image)
      given.convert("RGB").save(buffer, "PNG")
  except Exception as error:  # Pillow raises errors of many types for damaged files.
    raise UserError(
      f"{where}: the image cannot be read ({error}); it must be the path of an image file, a PIL "
      "image or an array uint8 [H, W, 3]."
    ) from error
  return buffer.getvalue()


def _write_pairs(pairs: Sequence[Any], folder: pathlib.Path) -> dict[str, str]:
  lines, images = [], {}
  for number, (image, caption) in enumerate(pairs):
    if not isinstance(caption, str):
      kind = type(caption).__name__
      raise UserError(f"data[{number}]: the caption is of type {kind}; it must be a text.")
    name = f"{number:06}.png"
    images[name] = _png(image, f"data[{number}]")
    lines.append(json.dumps({"key": f"{number:06}", "image": name, "caption": caption}))
  _write(folder, {"pairs.jsonl": lines}, images)
  return {"raw.source": str(folder)}


def _write_records(records: Sequence[Any], kind: str, folder: pathlib.Path) -> dict[str, str]:
  """Writes records and their task. All records with the same first image are in one split."""
  image_names, text_names, template, target = KINDS[kind]
  splits: dict[str, list[str]] = {"train": [], "heldout": []}
  images: dict[str, bytes] = {}
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
    first = list(images).index(names[image_names[0]])
    split = "heldout" if first % HELDOUT == HELDOUT - 1 else "train"
    line = {"key": f"{number:06}", "group": names[image_names[0]], "texts": texts, "images": names}
    splits[split].append(json.dumps(line))
  if not splits["heldout"]:
    raise UserError(
      f"data has {len(images)} images; it must have at least {HELDOUT}, because one of {HELDOUT} "
      "is held out."
    )
  task = {"name": kind, "format": "jsonl", "templates": [template], "target": target}
  task["heldout"] = "heldout"
  files = {f"{split}.jsonl": lines for split, lines in splits.items()}
  _write(folder, {**files, "tasks.yaml": [json.dumps([task])]}, images)  # JSON is also YAML.
  return {"instructions.tasks": str(folder / "tasks.yaml"), "instructions.root": str(folder)}


def _write(folder: pathlib.Path, files: dict[str, list[str]], images: dict[str, bytes]) -> None:
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


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
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
    for line in _lines(process):
      last = line or last
      if show_progress and not line.startswith("error: "):
        print(line, flush=True)
  if process.returncode:
    raise UserError(last.removeprefix("error: "))
