"""Checks the arguments of `CM3Leon`'s methods and makes tasks from them."""

from collections.abc import Sequence
import dataclasses
import difflib
import functools
import operator
import os
from typing import Any
import warnings

import numpy as np
from PIL import Image

from cm3leon_jax.config import UserError, build, short
from cm3leon_jax.decoding.config import SamplingConfig
from cm3leon_jax.decoding.sampling.methods import is_guided
from cm3leon_jax.generation import prompt_file
from cm3leon_jax.generation.doubts import doubts
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.generation.tasks import GUIDANCE, Task

PROMPTS = ("question", "instruction")  # Other names for `prompt`, in `answer` and `edit`.


def whole(name: str, value: Any, least: int = 0) -> int:
  """Returns `value` as an int. Raises UserError if it is not an integer or less than `least`."""
  try:
    if isinstance(value, bool | np.bool_):
      raise TypeError("a truth value is not a number")
    number = operator.index(value)
  except TypeError as error:
    raise UserError(f"{name} is {short(value)}; it must be a whole number.") from error
  if number < least:
    raise UserError(f"{name} is {short(number)}; it must be at least {least}.")
  return number


def truth(name: str, value: Any) -> bool:
  """Returns a bool. Raises UserError for other types, because the text "no" would count as true."""
  if not isinstance(value, bool | np.bool_):
    raise UserError(f"{name} is {short(value)}; it must be True or False.")
  return bool(value)


def folder(name: str, value: Any) -> str:
  """Returns a path as a string. Raises UserError if `value` is empty or not a path."""
  if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
    raise UserError(f"{name} is {short(value)}; it must be the path of a folder.")
  if not os.fspath(value).strip():
    raise UserError(f"{name} is empty; it must be the path of a folder.")
  return os.path.expanduser(value)


def given_tasks(value: Any) -> list[Task]:
  """Returns `value` as a list. Raises UserError if it is not a list of tasks."""
  if not isinstance(value, list | tuple) or not all(isinstance(task, Task) for task in value):
    raise UserError(
      f"tasks is {short(value)}; it must be a list of tasks of cm3leon_jax.generation.image_tasks "
      "and text_tasks, e.g. [TextToImage('a green bell')]."
    )
  return list(value)


def text(name: str, value: Any) -> str:
  """Returns `value`. Raises UserError if it is not a string."""
  if not isinstance(value, str):
    kind = type(value).__name__
    raise UserError(f"{name} has type {kind}; it must be a text, or a list of texts.")
  return value


def image(value: Any) -> str | Image.Image | np.ndarray:
  """Returns an image for a task. Raises UserError unless `value` is a path, PIL image or array."""
  if isinstance(value, str | os.PathLike):
    if os.fspath(value).lower().startswith(("http://", "https://")):
      raise UserError(f"image {value} is a URL; download the image, and give the path of its file.")
    return os.path.expanduser(value)
  if isinstance(value, Image.Image) and all(value.size):
    return value
  is_array = isinstance(value, np.ndarray)
  if is_array and value.size and value.dtype == np.uint8 and value.shape[2:] == (3,):
    return value
  found = type(value).__name__
  if isinstance(value, Image.Image):
    found = f"{found} of {value.width} x {value.height} pixels"
  if is_array:
    found = f"{value.dtype}{list(value.shape)}"
  raise UserError(
    f"image has type {found}; it must be a path, a PIL image, an array uint8[H, W, 3], or a list."
  )


def boxes(value: Any) -> tuple | list[tuple]:
  """Returns one box as a tuple, or a list of boxes. Raises UserError for other types."""
  if not isinstance(value, list | tuple):
    raise UserError(
      f"box is {short(value)}; it must be (left, top, right, bottom), or a list of boxes."
    )
  if value and isinstance(value[0], list | tuple):
    return [tuple(box) for box in value]
  return tuple(value)


def queries(value: Any) -> tuple[bool, list[tuple[str, Any]]]:
  """Returns (whether `value` is a single query, queries as ("text", text) or ("image", image)).

  Raises:
    UserError: a query is neither a text nor an image.
  """
  single = not isinstance(value, list)
  found = []
  for query in [value] if single else value:
    if not isinstance(query, str | os.PathLike | Image.Image | np.ndarray):
      raise UserError(
        f"query has type {type(query).__name__}; it must be a text, a PIL image, an array "
        "uint8[H, W, 3], or a list."
      )
    found.append(("text", query) if isinstance(query, str) else ("image", image(query)))
  return single, found


def check_samples(pipeline: Pipeline, tasks: Sequence[Task], num_samples: Any, rank: Any) -> int:
  """Returns `num_samples` as an int. Warns about tasks for which the model was not trained.

  Raises:
    UserError: `num_samples` is not a positive integer; `rank` is not a bool; or ranking is
      requested for one sample, without a CLIP model, or for a task that CLIP cannot score.
  """
  count, rank = whole("num_samples", num_samples, 1), truth("rank", rank)
  if rank and count == 1:
    raise UserError("rank orders the samples of a prompt, but num_samples is 1: set it to e.g. 8.")
  if rank and pipeline.clip is None:
    raise UserError("rank orders samples by their CLIP scores, but this model has no CLIP.")
  for task in tasks if rank else ():
    if not task.is_scored:
      raise UserError(f"rank is given, but CLIP cannot score task {task.name} without a caption.")
  for sentence in doubts(tasks, pipeline.layout, pipeline.settings, pipeline.unseen):
    warnings.warn(sentence, stacklevel=4)
  return count


def rows(**inputs: Any) -> tuple[bool, list[dict]]:
  """Checks the inputs of a call and distributes them over its tasks.

  Each value in `inputs` is one input or a list of inputs. Inputs other than image and box are
  texts. Returns (True if no input is a list, the inputs of each task).

    rows(image="a.png", prompt=["x", "y"])
    (False, [{"image": "a.png", "prompt": "x"}, {"image": "a.png", "prompt": "y"}])

  Raises:
    UserError: an input has a wrong type, or lists have different lengths.
  """
  inputs = {name: _checked(name, value) for name, value in inputs.items()}
  lengths = {name: len(value) for name, value in inputs.items() if isinstance(value, list)}
  if len(set(lengths.values())) > 1:
    listed = " and ".join(f"{name} of {n}" for name, n in lengths.items())
    raise UserError(
      f"lists have different lengths: {listed}; give lists of equal length, or single values."
    )
  count = next(iter(lengths.values()), 1)
  return not lengths, [
    {name: value[i] if name in lengths else value for name, value in inputs.items()}
    for i in range(count)
  ]


def _checked(name: str, value: Any) -> Any:
  """Checks an input, or each input in a list, and returns it in the type that tasks take."""
  if name == "box":
    return boxes(value)
  check = image if name == "image" else functools.partial(text, name)
  return [check(v) for v in value] if isinstance(value, list) else check(value)


def foreign(field: str, taken: Sequence[str]) -> str | None:
  """Returns what to use instead of a keyword of diffusers or transformers; None for other keywords.

  `taken` contains the settings that the task uses. It is empty if the method does not generate.
  """
  guidance = [name for name in ("guidance", "image_guidance", "edit_guidance") if name in taken]
  known = {
    "guidance_scale": f"it is {' and '.join(guidance)} here."
    if guidance
    else "guidance is a keyword of generate, and texts have no guidance: leave it out.",
    "generator": "it is seed here, a whole number: the same seed gives the same result.",
    "num_images_per_prompt": "it is num_samples here, a keyword of generate.",
    "max_new_tokens": "it is length here, in calls that write texts; an image has a fixed length.",
    "num_inference_steps": "an image takes one step for each of its codes: leave it out.",
    "dtype": "give it to load: CM3Leon.load(workdir, dtype='bfloat16').",
    "torch_dtype": "it is dtype of load here: CM3Leon.load(workdir, dtype='bfloat16').",
    "device": "it is devices of load here: CM3Leon.load(workdir, devices=jax.devices()[:1]).",
  }
  return known.get(field)


def sampling(name: str, defaults: SamplingConfig, given: dict[str, Any]) -> SamplingConfig:
  """Returns the sampling settings of the task `name`: the `defaults`, overridden by `given`.

  Raises:
    UserError: the task does not use a setting, or a setting has an invalid value.
  """
  taken = prompt_file.task_class(name).settings
  for field in given:
    if field not in taken:
      if known := foreign(field, taken):
        raise UserError(f"task {name} reads no setting '{field}': {known}")
      close = difflib.get_close_matches(field, taken, 1)
      hint = f"did you mean '{close[0]}'?" if close else f"its settings are {', '.join(taken)}."
      raise UserError(f"task {name} reads no setting '{field}': {hint}")
  try:
    return build(SamplingConfig, {**dataclasses.asdict(defaults), **given}, "sampling")
  except UserError as error:
    raise UserError(str(error).removeprefix("config.")) from error


def tasks(
  name: str,
  defaults: SamplingConfig,
  seed: int,
  settings: dict[str, Any],
  inputs: dict[str, Any],
  **fields: int | None,
) -> tuple[bool, list[Task]]:
  """Makes the tasks of one method call.

  Task i has the seed `seed` + i. The keys of `inputs` are image, box, and prompt or one of
  `PROMPTS`. Each value is one input or a list. `fields` are integers that all tasks share; None
  means the default of the task. Returns (True if no input is a list, tasks).

  Raises:
    UserError: an argument has an invalid value.
  """
  seed, config = whole("seed", seed), sampling(name, defaults, settings)
  shared: dict[str, Any] = {
    field: whole(field, value, least=int(field == "length"))
    for field, value in fields.items()
    if value is not None
  }
  single, chosen = rows(**inputs)
  made = []
  for i, row in enumerate(chosen):
    row = {"prompt" if key in PROMPTS else key: value for key, value in row.items()}
    made.append(
      prompt_file.task_class(name)(**row, **shared, seed=seed + i, sampling=config, row=i)
    )
  for task in made:
    task.validate()
    for field in task.unread_settings():
      if field in settings:
        raise UserError(_unread(task, field))
  return single, made


def _unread(task: Task, field: str) -> str:
  """Returns a message that explains why a given setting has no effect."""
  if field in GUIDANCE and is_guided(task.sampling.method):
    return f"{field} is given without a prompt for guidance: give a prompt, or leave {field} out."
  return (
    f"{field} is given, which sampling.method = '{task.sampling.method}' does not read: leave it "
    "out, or choose another method."
  )
