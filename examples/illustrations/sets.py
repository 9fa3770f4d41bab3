"""Reads emoji sets of Iconify and finds the drawings of six sets that show the same thing."""

from collections.abc import Iterable, Mapping
import dataclasses
import io
import json
import pathlib
import re
import tarfile
import unicodedata

import emoji
import numpy as np
from PIL import Image
import resvg_py

# H height, W width.

# Package of npm -> name of the style in captions.
STYLES = {
  "noto": "Noto",
  "noto-v1": "early Noto",
  "fluent-emoji-flat": "Fluent",
  "fxemoji": "Firefox",
  "twemoji": "Twemoji",
  "emojione": "EmojiOne",
}
GET = "npm pack " + " ".join(f"@iconify-json/{package}" for package in STYLES)
# Files of a package that are read. Those of all six sets have at most 20 MB.
_FILES = ("icons.json", "info.json", "metadata.json")
_SVG = "http://www.w3.org/2000/svg"
_LEFT_OUT = re.compile(
  r"skin-tone|-(?:light|medium|dark)$|flag|keycap|o-?clock|thirty$|button|letter|regional"
  r"|squared|input-|^(?:digit-\w+|asterisk|number-sign|.)$"
)


class SetError(Exception):
  """A package is missing or is not a set of icons; the message says which and what to do."""


@dataclasses.dataclass(frozen=True)
class IconSet:
  """One set: icon name -> SVG text, and alias -> icon name."""

  style: str
  license: str
  attribution: str
  source: str
  drawings: dict[str, str]
  aliases: dict[str, str]
  categories: dict[str, list[str]]

  def of(self, *categories: str) -> set[str]:
    """Returns the names of the icons in any of these categories."""
    return {name for category in categories for name in self.categories.get(category, ())}


@dataclasses.dataclass(frozen=True)
class Drawing:
  """A drawing of a concept in the style of a set."""

  concept: str  # The name of what is drawn, e.g. "fire engine".
  style: str
  svg: str
  keywords: tuple[str, ...] = ()

  @property
  def key(self) -> str:
    return f"{self.concept}/{self.style}".replace(" ", "_")


def read(folder: pathlib.Path, styles: Mapping[str, str] = STYLES) -> list[IconSet]:
  """Reads packed packages `iconify-json-NAME-VERSION.tgz` of a folder: the keys of `styles`.

  Raises:
    SetError: a package is missing, or is no icon set.
  """
  sets = []
  for package, style in styles.items():
    name = re.compile(rf"iconify-json-{re.escape(package)}-\d[\d.]*\.tgz")
    if not (result := sorted(path for path in folder.glob("*.tgz") if name.fullmatch(path.name))):
      get = GET if styles is STYLES else f"npm pack @iconify-json/{package}"
      raise SetError(f"{folder} has no iconify-json-{package}-VERSION.tgz: run `{get}` there.")
    sets.append(_read_set(result[-1], style))
  return sets


def _read_set(path: pathlib.Path, style: str) -> IconSet:
  try:
    with tarfile.open(path) as tar:
      icons, info, about = (
        json.load(tar.extractfile(tar.getmember(f"package/{name}"))) for name in _FILES
      )
    sides = f"0 0 {icons.get('width', 16)} {icons.get('height', 16)}"
    start = f'<svg xmlns="{_SVG}" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{sides}">'
    return IconSet(
      style,
      info["license"]["spdx"],
      f"{info['name']} by {info['author']['name']} ({info['author']['url']})",
      f"https://www.npmjs.com/package/@iconify-json/{icons['prefix']}/v/{_version(path)}",
      {name: f"{start}{icon['body']}</svg>" for name, icon in icons["icons"].items()},
      # Aliases that flip or rotate an icon show something else.
      {a: v["parent"] for a, v in icons.get("aliases", {}).items() if set(v) == {"parent"}},
      about.get("categories", {}),
    )
  except (KeyError, ValueError, OSError, tarfile.TarError) as error:
    raise SetError(f"{path} is no icon set of Iconify ({error!r}): run `{GET}` again.") from error


def _version(path: pathlib.Path) -> str:
  return path.stem.rpartition("-")[2]


def drawings(sets: Iterable[IconSet], fewest: int = 3) -> list[Drawing]:
  """Returns one drawing per concept and set, of the concepts that `fewest` or more sets draw.

  Skin tones, flags, keycaps, clocks, letters and buttons with letters are left out.
  """
  sets, names = list(sets), Names()
  for icons in sets:
    for alias, name in icons.aliases.items():
      names.unite(alias, name)
  concepts: dict[str, dict[str, Drawing]] = {}
  left_out = set()
  for icons in sets:
    flags = icons.of("Flags")
    for name, svg in sorted(icons.drawings.items()):
      concept, *keywords = names.of(name)
      if name in flags or any(map(_LEFT_OUT.search, (name, concept))):
        left_out.add(concept)
      else:
        drawing = Drawing(concept, icons.style, svg, tuple(keywords))
        concepts.setdefault(concept, {}).setdefault(icons.style, drawing)
  return [
    drawing
    for concept, members in sorted(concepts.items())
    if concept not in left_out and len(members) >= fewest
    for drawing in members.values()
  ]


class Names:
  """Groups of names of one thing: aliases of the sets, names of Unicode and of `emoji`.

  Names are compared without case, spaces and punctuation: "alarmclock" is "Alarm clock".
  """

  def __init__(self) -> None:
    self._parents: dict[str, str] = {}
    self._words: dict[str, list[str]] = {}  # Root of a group -> its names in English.
    for characters, about in emoji.EMOJI_DATA.items():
      bare = characters.rstrip("\ufe0f")
      best, *more = [re.sub(r"[-_:]+", " ", name).strip() for name in _english(about)]
      unicode = [unicodedata.name(bare, best).lower()] if len(bare) == 1 else []
      for name in (*more, *unicode):
        self.unite(name, best)
      self._words.setdefault(self._root(best), []).extend([best, *more])

  def unite(self, name: str, other: str) -> None:
    """States that two names are names of one thing."""
    root, target = self._root(name), self._root(other)
    if root != target:
      self._parents[root] = target
      self._words.setdefault(target, []).extend(self._words.pop(root, []))

  def of(self, name: str) -> list[str]:
    """Returns the names of the thing in English, the best first; without any, the name itself."""
    result = self._words.get(self._root(name)) or [name.replace("-", " ")]
    return list(dict.fromkeys(word.lower() for word in result))

  def _root(self, name: str) -> str:
    short = re.sub(r"[\W_]+", "", name.lower())
    while (parent := self._parents.get(short, short)) != short:
      short = parent
    return short


def _english(about: dict) -> list[str]:
  return [about["en"], *about.get("alias", ())]


def render(svg: str, side: int) -> np.ndarray:
  """Draws an SVG text on white as an [H, W, 3] uint8 image with H = W = `side`."""
  return rgba(svg, side, "white")[..., :3]


def rgba(svg: str, side: int, background: str | None = None) -> np.ndarray:
  """Draws an SVG text as an [H, W, 4] uint8 image with H = W = `side`; alpha is the last channel.

  Raises:
    ValueError: the text is no SVG that resvg can draw.
  """
  png = resvg_py.svg_to_bytes(
    svg_string=svg, background=background, width=side, height=side, skip_system_fonts=True
  )
  with Image.open(io.BytesIO(png)) as image:
    return np.asarray(image.convert("RGBA"))
