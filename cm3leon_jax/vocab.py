"""Defines the joint vocabulary of text tokens and image codes."""

from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, PositiveInt
import pydantic.dataclasses

from cm3leon_jax.config.build import STRICT


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class VocabLayout:
  """Layout of the vocabulary: ids in `[0, text_size)` are text tokens, higher ids are image codes.

  The first `num_special` text ids are special tokens. The defaults are CM3Leon's 56,320 text tokens
  and 8,192 image codes (section 2.1). The total, 64,512 = 2^10 x 63, is evenly divisible by any
  mesh axis whose size is a power of two up to 1,024.
  """

  num_special: Annotated[int, Field(ge=6)] = 256
  """Number of special tokens: `<pad>`, `</s>`, `<unk>`, `<break>`, `<eoss>`, and at least one
  sentinel `<mask:i>`. They are part of the text range."""
  text_size: PositiveInt = 56_320
  """Number of text tokens, special tokens included. It must be at least `num_special` + 256, since
  byte-level BPE needs 256 byte tokens."""
  image_size: PositiveInt = 8_192
  """Number of image codes. Code `c` has the id `text_size + c`."""
  template: Literal["cm3leon", "chameleon"] = "cm3leon"
  """How texts and images are joined into documents and prompts. `cm3leon` is the paper's:
  `</s> text <break> image </s>`. `chameleon` is for decoders that continue Chameleon or Anole:
  `</s> text <break> image <image_end>`, where `<break>` begins an image, `<eoss>` also ends a text
  before a text, and the last special token, `<image_end>`, ends an image. Captions and answers then
  follow their image."""

  pad = 0
  eos = 1  # </s> separates documents and starts every sample.
  unk = 2
  brk = 3  # <break> separates segments, such as a caption and its image.
  eoss = 4  # <eoss> ends an infilled span.

  def __post_init__(self) -> None:
    if self.num_masks < 1:
      raise ValueError(
        f"num_special is {self.num_special}; it must be at least {self.num_special + 1} with the "
        f"template '{self.template}', which has a special token more."
      )
    if self.text_size < self.num_special + 256:
      raise ValueError(
        f"text_size is {self.text_size}; it must be at least {self.num_special + 256}: "
        f"num_special = {self.num_special} and the 256 bytes of byte-level BPE."
      )

  @property
  def size(self) -> int:
    """Number of ids in the vocabulary."""
    return self.text_size + self.image_size

  @property
  def num_masks(self) -> int:
    """Number of sentinels `<mask:i>`."""
    return self.num_special - 5 - (self.template == "chameleon")

  @property
  def image_end(self) -> int:
    """The id of `<image_end>`, which only the template `chameleon` has."""
    return self.num_special - 1

  @property
  def sizes(self) -> dict[str, int]:
    """The fields that decide the meaning of the ids of texts and images."""
    return {name: getattr(self, name) for name in ("num_special", "text_size", "image_size")}

  def mask(self, i: int) -> int:
    """Returns the id of the sentinel `<mask:i>`. Raises ValueError if `i` is out of range."""
    if not 0 <= i < self.num_masks:
      raise ValueError(f"<mask:{i}> does not exist: the vocabulary has {self.num_masks} sentinels.")
    return 5 + i

  def is_mask(self, ids: Any) -> Any:
    """Returns a bool mask: True where `ids` (an int or an array) is a sentinel `<mask:i>`."""
    return (ids >= 5) & (ids < 5 + self.num_masks)

  def is_image(self, ids: Any) -> Any:
    """Returns a bool mask: True where `ids` (an int or an array) is an image code."""
    return (ids >= self.text_size) & (ids < self.size)

  def image_ids(self, codes: npt.ArrayLike) -> npt.NDArray[np.int32]:
    """Converts image codes to ids. Raises ValueError if a code is out of range."""
    codes = np.asarray(codes, np.int32)
    if codes.size and not (codes.min() >= 0 and codes.max() < self.image_size):
      raise ValueError(
        f"image codes are in [{codes.min()}, {codes.max()}]; "
        f"they must be in [0, {self.image_size})."
      )
    return codes + self.text_size

  def image_codes(self, ids: npt.ArrayLike) -> npt.NDArray[np.int32]:
    """Converts ids to image codes. Raises ValueError if an id is not an image code."""
    ids = np.asarray(ids, np.int32)
    if ids.size and not self.is_image(ids).all():
      raise ValueError(
        f"id {int(ids[~self.is_image(ids)][0])} is not an image code; "
        f"image codes have ids in [{self.text_size}, {self.size})."
      )
    return ids - self.text_size

  def special_tokens(self) -> list[str]:
    """Returns the names of the special tokens, in the order of their ids."""
    masks = [f"<mask:{i}>" for i in range(self.num_masks)]
    more = ["<image_end>"] * (self.template == "chameleon")
    return ["<pad>", "</s>", "<unk>", "<break>", "<eoss>", *masks, *more]
