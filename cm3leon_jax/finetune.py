"""Tunes a base on a folder or on pairs, by `cm3leon run`; see `CM3Leon.finetune`.

Given pairs are written to the workdir first, so that the command reads them like any other data and
can be repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
import hashlib
import inspect
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any, Literal

from PIL import Image

from cm3leon_jax.errors import UserError, did_you_mean
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.generation import calls, given_images

GIVEN = "given"  # Folder in the workdir with the pairs that were given.


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
  **unknown: Any,
) -> None:
  """Runs all stages of a tuning; the same call continues a run that was stopped.

  Args:
    data: a folder, or pairs (image, caption) or (image, caption, concept). An image is a path, a
      PIL image or an array, uint8 [H, W, 3].
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
    UserError: an option or image is wrong, the workdir has other data, or a stage raised an error.
  """
  if unknown:
    name, options = next(iter(unknown)), list(inspect.signature(run).parameters)[3:-1]
    hint = did_you_mean(name, options, "`minutes` sets how long it trains.")
    raise UserError(f"finetune has no option '{name}', only {', '.join(options)}: {hint}")
  try:
    config = f"--config=own:{minutes:g}"
  except (TypeError, ValueError) as error:
    message = f"minutes={minutes!r} is not a number: give the minutes of all stages."
    raise UserError(message) from error
  folder = pathlib.Path(os.path.expanduser(workdir))
  if isinstance(data, str | os.PathLike):
    source = os.path.expanduser(data)
  else:
    source = str(_write_pairs(data, folder / GIVEN))
  values = {"raw.source": source, "train.max_forgetting": max_forgetting, **(fields or {})}
  flags = [config, f"--workdir={folder}", f"--init_from={os.fspath(base)}"]
  flags += [f"--config.{name}={value}" for name, value in values.items()]
  flags += ["--own_image_tokenizer"] if tokenizer == "own" else []
  limits = {"min_psnr": min_psnr, "max_color_difference": max_color_difference}
  flags += [f"--{name}={value}" for name, value in limits.items() if value is not None]
  _start(flags, show_progress is not False)


def _write_pairs(pairs: Iterable[Any], folder: pathlib.Path) -> pathlib.Path:
  """Writes pairs to a folder. Writes no file if `folder` already has the same pairs."""
  about, digests, lines = folder / "digest.json", [], []
  stored = read_json(about, {"sha256": str})["sha256"] if about.exists() else None
  for number, (image, *texts) in enumerate(pairs):
    name = f"{number:06}.png"
    try:
      png = as_png(image)
    except UserError as error:
      raise UserError(f"pair {number}: {error}") from error
    if stored is None:
      folder.mkdir(parents=True, exist_ok=True)
      (folder / name).write_bytes(png)
    digests.append(hashlib.sha256(png).digest())
    given = dict(zip(("caption", "concept"), texts, strict=False))
    lines.append(json.dumps({"key": f"{number:06}", "image": name, **given}))
  if not lines:
    raise UserError("the list has no pairs: give pairs (image, caption), or a folder.")
  head = json.dumps({"pairs.jsonl": lines}).encode()
  result = hashlib.sha256(b"".join([head, *digests])).hexdigest()
  if stored is None:
    (folder / "pairs.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    write_json(about, {"sha256": result})  # The folder is complete when it has this file.
  elif stored != result:
    raise UserError(f"{folder} has the data of another call: use another workdir.")
  return folder


def as_png(image: str | os.PathLike[str] | Image.Image | Any) -> bytes:
  """Returns an image as an RGB PNG file. For the limits and errors, see `reader.load_image`."""
  buffer = io.BytesIO()
  pixels = given_images.load_image(calls.expanded(image), None)
  Image.fromarray(pixels).save(buffer, "PNG")
  return buffer.getvalue()


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
