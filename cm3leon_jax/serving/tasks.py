"""Creates the task of a request from its checked body. Errors use the field names of the body."""

# H height, W width.

import dataclasses
import re
import secrets
from typing import Any

import numpy as np

from cm3leon_jax.decoding import grammar
from cm3leon_jax.errors import UserError
from cm3leon_jax.generation import calls
from cm3leon_jax.generation.explanation import REFUSED
from cm3leon_jax.generation.image_tasks import ImageTask
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.generation.tasks import MASK, Task
from cm3leon_jax.generation.text_tasks import TEXT_LENGTH
from cm3leon_jax.serving import schemas, uploads
from cm3leon_jax.serving.errors import ApiError, refusal

FIELDS = {*schemas.EditBody.model_fields, *schemas.Chat.model_fields}


def generation(pipeline: Pipeline, body: schemas.Generation) -> ImageTask:
  """Creates a task that generates an image for a prompt. Raises ApiError if a field is invalid."""
  retrieve = pipeline.usual_retrieve if body.retrieve is None else body.retrieve
  if body.explain and not retrieve:
    raise refusal(REFUSED, "explain")
  return _task(pipeline, "text_to_image", body, {"prompt": body.prompt}, retrieve=retrieve)


def edit(pipeline: Pipeline, body: schemas.EditBody, image: np.ndarray) -> ImageTask:
  """Creates a task that edits an image by an instruction or, with a box, fills in the box.

  `image` is [H, W, 3] uint8, as `uploads.decode` returns it.

  Raises:
    ApiError: a field is invalid or missing, or belongs to the other kind of edit.
  """
  inputs: dict[str, Any] = {"image": image, "prompt": body.prompt}
  if body.box is None:
    if body.retrieve:
      raise refusal("an edit retrieves no documents: leave retrieve out.", "retrieve")
    return _task(pipeline, "edit", body, inputs)
  inputs["box"] = body.box
  return _task(pipeline, "infill_image", body, inputs, retrieve=body.retrieve or 0)


def chat(pipeline: Pipeline, body: schemas.Chat, text: str, image: np.ndarray | None) -> Task:
  """Creates the task of a chat message: to caption an image, to answer, or to fill holes in a text.

  `text` is the text from `content`. `image` is [H, W, 3] uint8, as `uploads.decode` returns it, or
  None.

  Raises:
    ApiError: a field is invalid, or the message and the requested tokens together are too long.
  """
  inputs: dict[str, Any] = {}
  if image is not None:
    inputs["image"] = image
  if text:
    inputs["prompt"] = text
  kind = "infill_text" if MASK in text else "question" if text else "caption"
  task = _task(pipeline, kind, body, inputs, retrieve=body.retrieve or 0, length=1)
  request = task.to_request(pipeline.layout)
  holes = sum(part.kind == grammar.TEXT for part in request.plan)
  most = 1 + (pipeline.layout.positions - request.positions) // holes
  name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
  length = getattr(body, name)
  if (length or 1) > most:
    raise refusal(f"{name} is {length}; after this message there is space for {most}.", name)
  changed: dict[str, Any] = {"length": length or min(TEXT_LENGTH, most)}
  return dataclasses.replace(task, **changed)


def content(messages: list[schemas.Message]) -> tuple[str, bytes | None]:
  """Returns text and image of the only message. Raises ApiError if the messages are invalid."""
  if len(messages) != 1 or messages[0].role != "user":
    raise refusal(
      f"messages has {len(messages)} messages; this model answers one message with the role user: "
      "an image, and a question about it.",
      "messages",
    )
  parts = messages[0].content
  text = " ".join(p.text.strip() for p in parts if p.type == "text" and p.text)
  images = [p.image_url for p in parts if p.type == "image_url"]
  if len(images) > 1 or None in images:
    raise refusal("messages must have at most one image, in image_url.url.", "messages")
  if not images and MASK not in text:
    raise refusal(
      f"the message has no image: add an image for a caption or an answer, or write {MASK} where "
      "text should be filled in; this model does not chat.",
      "messages",
    )
  image = images[0] if images else None
  return text, None if image is None else uploads.from_data_url(image.url, "image_url.url")


def refused(message: str) -> ApiError:
  """Makes an ApiError of a task's error. Its param is the first field that the message names.

  refused("config.sampling.text_top_p is 0.0; ...") has the param "top_p"
  """
  words = re.findall(r"\w+", message.replace("text_top", "top").replace("text_temp", "temp"))
  return refusal(message, next((word for word in words if word in FIELDS), None))


def _task(pipeline: Pipeline, kind: str, body: schemas.Body, inputs: dict, **fields: int) -> Any:
  """Creates a task and checks that it fits the model. Raises ApiError instead of UserError."""
  seed = secrets.randbelow(2**31) if body.seed is None else body.seed
  defaults = pipeline.settings.sampling
  try:
    _, [task] = calls.tasks(kind, defaults, seed, body.sampling(), inputs, **fields)
    task.to_request(pipeline.layout)
    return task
  except UserError as error:
    raise refused(str(error)) from error
