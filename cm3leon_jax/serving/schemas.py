"""Defines the bodies of requests, and rejects unknown fields and invalid values."""

from collections.abc import Mapping
import re
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic
from pydantic import BeforeValidator, Field
import pydantic_core
from pydantic_core import PydanticCustomError

from cm3leon_jax.config.sampling import Schedule
from cm3leon_jax.errors import short
from cm3leon_jax.serving.errors import ApiError

Seed = Annotated[int, Field(ge=0, lt=2**32)]
Weight = Annotated[float, Field(ge=-1e6, le=1e6)]
Count = Annotated[int, Field(ge=0, le=2**20)]
MOST_MARKS = 10_000  # Largest number of brackets, braces and commas in a body.
MOST_WIDE = 2**22  # Maximum bytes of a body that has a character of four bytes.
FOUR_BYTES = re.compile(rb"[\xf0-\xf7]")
MOST_PARTS = 64  # Largest number of messages, and of parts of a message.
# Fields of the OpenAI API that the server always ignores. Their values may have any type.
NO_MEANING = ("user", "safety_identifier", "metadata", "store", "service_tier")


class Body(pydantic.BaseModel):
  """Fields that all requests have.

  Attributes:
    ignored: fields of the OpenAI API that this server ignores.
    settings: fields that are settings of `SamplingConfig`.
    model: name of the served model; may be absent.
    seed: seed of the first sample. Without it, the server uses a random seed.
    stream: whether to answer with server-sent events.
  """

  model_config = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)
  ignored: ClassVar[tuple[str, ...]] = NO_MEANING
  settings: ClassVar[tuple[str, ...]] = ()

  model: str | None = None
  n: Annotated[int, Field(ge=1)] = 1
  seed: Seed | None = None
  stream: bool = False
  retrieve: Annotated[int, Field(ge=0)] | None = None
  temperature: Annotated[float, Field(ge=0, le=1e6)] | None = None
  top_k: Count | None = None
  top_p: Annotated[float, Field(gt=0, le=1)] | None = None

  def sampling(self) -> dict[str, Any]:
    """Returns the sampling settings in the body."""
    return {name: value for name in self.settings if (value := getattr(self, name)) is not None}


class ImageBody(Body):
  """Fields of requests whose answer is an image."""

  ignored: ClassVar[tuple[str, ...]] = (
    *NO_MEANING,
    *("quality", "style", "moderation", "input_fidelity", "output_compression"),
  )
  settings: ClassVar[tuple[str, ...]] = (
    *("guidance", "guidance_schedule", "temperature", "top_k", "top_p"),
  )

  prompt: str = ""
  size: str = "auto"
  response_format: Literal["b64_json"] = "b64_json"
  output_format: Literal["png"] = "png"
  background: Literal["auto", "opaque"] = "auto"
  partial_images: Annotated[int, Field(ge=0, le=1_000)] | None = None
  guidance: Weight | None = None
  guidance_schedule: Schedule | None = None


class Generation(ImageBody):
  """Body of POST /v1/images/generations. `explain`: whether the answer has `ratios`."""

  prompt: str
  explain: bool = False


def _box(text: str) -> tuple[int, ...]:
  if not re.fullmatch(r"\s*-?\d{1,6}\s*(,\s*-?\d{1,6}\s*){3}", text):
    raise PydanticCustomError(
      "box", "Input should be four whole numbers of pixels, left,top,right,bottom: 0,0,24,24"
    )
  return tuple(map(int, text.split(",")))


class EditBody(ImageBody):
  """Fields of the form that POST /v1/images/edits receives, except its files.

  `box` is the box to fill in: left,top,right,bottom in pixels at the model's resolution.
  """

  settings: ClassVar[tuple[str, ...]] = (*ImageBody.settings, "image_guidance", "edit_guidance")

  box: Annotated[tuple[int, ...] | None, BeforeValidator(_box)] = None
  image_guidance: Weight | None = None
  edit_guidance: Weight | None = None


class ImageUrl(pydantic.BaseModel):
  """Value of a message part of type image_url."""

  model_config = pydantic.ConfigDict(extra="forbid")
  url: str
  detail: str = "auto"


class MessagePart(pydantic.BaseModel):
  """Text or image in a message."""

  model_config = pydantic.ConfigDict(extra="forbid")
  type: Literal["text", "image_url"]
  text: str | None = None
  image_url: ImageUrl | None = None


def _parts(value: Any) -> Any:
  """Converts a text to a list with one part; returns other values unchanged."""
  if isinstance(value, str):
    return [MessagePart(type="text", text=value)]
  if not isinstance(value, list):
    raise PydanticCustomError("content", "Input should be a text, or a list of parts")
  return value


class Message(pydantic.BaseModel):
  """Message of a chat."""

  model_config = pydantic.ConfigDict(extra="forbid")
  role: str
  content: Annotated[list[MessagePart], Field(max_length=MOST_PARTS), BeforeValidator(_parts)]
  name: str | None = None


class StreamOptions(pydantic.BaseModel):
  """Options of a streamed chat."""

  model_config = pydantic.ConfigDict(extra="forbid")
  include_usage: bool = False
  include_obfuscation: bool = False


class Chat(Body):
  """Body of POST /v1/chat/completions."""

  messages: Annotated[list[Message], Field(max_length=MOST_PARTS)]
  stream_options: StreamOptions = StreamOptions()
  max_tokens: Annotated[int, Field(ge=1, le=2**20)] | None = None
  max_completion_tokens: Annotated[int, Field(ge=1, le=2**20)] | None = None
  frequency_penalty: Annotated[float, Field(ge=0, le=0)] = 0
  presence_penalty: Annotated[float, Field(ge=0, le=0)] = 0

  def sampling(self) -> dict[str, Any]:
    """Returns the sampling settings in the body. Temperature 0 means greedy decoding."""
    given = {"text_temperature": self.temperature, "text_top_k": self.top_k}
    if self.temperature == 0:
      given = {"text_top_k": 1}
    given["text_top_p"] = self.top_p
    return {name: value for name, value in given.items() if value is not None}


B = TypeVar("B", bound=Body)


def read_json(text: bytes) -> dict:
  """Parses a JSON object. Raises ApiError if the text is not a JSON object."""

  # Each value becomes a Python object and possibly a validation error. A body with very many values
  # would take gigabytes and seconds.
  marks = sum(map(text.count, (b"[", b"{", b",")))
  if marks > MOST_MARKS:
    raise ApiError(
      400,
      f"the body has {marks:,} brackets, braces and commas; at most {MOST_MARKS:,} are allowed.",
    )
  # With one character of four bytes, a Python string uses four bytes for each of its characters.
  if len(text) > MOST_WIDE and FOUR_BYTES.search(text):
    raise ApiError(
      413,
      f"the body has {len(text):,} bytes, including characters of four bytes, such as emoji; a "
      f"body with such characters may have at most {MOST_WIDE:,} bytes.",
    )
  try:
    found = pydantic_core.from_json(text, allow_inf_nan=False)
  except ValueError as error:
    raise ApiError(
      400, f"the body is not valid JSON ({short(str(error))}): send a JSON object."
    ) from error
  if not isinstance(found, dict):
    raise ApiError(400, f"the body is a JSON {type(found).__name__}; it must be an object.")
  return found


def read(cls: type[B], values: Mapping[str, Any], strict: bool = True) -> B:
  """Checks the values of a request's body. A field that is null counts as absent.

  With `strict`, values must have the exact types, as in JSON. In a form, all values are texts.

  Raises:
    ApiError: a field is unknown or missing, or has an invalid value.
  """
  given = {k: v for k, v in values.items() if v is not None and k not in cls.ignored}
  try:
    return cls.model_validate(given, strict=strict)
  except RecursionError as error:
    raise ApiError(400, "the body is nested too deeply.") from error
  except pydantic.ValidationError as error:
    # Report unknown fields first: a field may be missing because its name is misspelled.
    details = error.errors(include_url=False, include_context=False, include_input=False)
    first = min(details, key=lambda detail: detail["type"] != "extra_forbidden")
    # `repr` of a whole key would take as much memory as the body.
    field = short(".".join(str(part)[:90] for part in first["loc"])).strip("'\"")
    raise ApiError(400, f"{field}: {first['msg']}.", field, first["type"]) from error
