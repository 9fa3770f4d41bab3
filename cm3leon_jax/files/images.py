"""Converts decoded images to upright RGB on white. All given images pass this module."""

import numpy as np
from PIL import Image, ImageOps


def upright_rgb(image: Image.Image) -> Image.Image:
  """Rotates an image upright by its EXIF tag, puts it on white, and converts it to 8-bit RGB.

  16-bit gray, which Pillow would clip at 255, is scaled to 8 bits. Gray of 32 bits (modes I and F)
  counts as 16-bit gray if a value is above 255.
  """
  upright = ImageOps.exif_transpose(image)
  del image  # Frees the original pixels, and the decoder, if the caller has no reference to them.
  if upright.mode.startswith(("I", "F")):
    gray = np.asarray(upright)
    white = 65_535 if ";16" in upright.mode or gray.max() > 255 else 255
    scaled = np.multiply(gray, 255 / white, dtype=np.float32)
    upright = Image.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8))
  if not upright.has_transparency_data:
    return upright.convert("RGB")
  upright = upright.convert("RGBA")
  paper = Image.new("RGBA", upright.size, "white")
  return Image.alpha_composite(paper, upright).convert("RGB")
