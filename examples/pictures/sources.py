"""Reads packages with drawings, icons, fonts and photographs, from which pictures are made."""

import collections
from collections.abc import Iterable, Iterator
import dataclasses
import io
import pathlib
import re
import subprocess
import tarfile
import zipfile

from PIL import Image

from examples.illustrations import sets

EMOJI = tuple(sets.STYLES)
# The names of packages of @iconify-json under Apache-2.0, MIT and CC BY 4.0. Brands are left out.
ICONS = (
  *(f"streamline-{style}-color" for style in ("plump", "flex", "sharp", "ultimate", "kameleon")),
  *("streamline-color", "streamline-freehand-color", "streamline-cyber-color", "fluent-color"),
  *("icon-park", "meteocons", "circle-flags", "flag", "flagpack"),
)
ONE_COLOR = ("material-symbols",)
HELD_OUT = ("streamline-emojis", "flat-color-icons")  # A whole artist, and a whole set of icons.
FONTS = (
  *("roboto", "open-sans", "lato", "montserrat", "merriweather", "playfair-display", "oswald"),
  *("lora", "inconsolata", "pacifico", "bitter", "raleway", "anton", "caveat", "abril-fatface"),
  *("press-start-2p", "comfortaa", "bangers", "righteous", "special-elite", "cinzel"),
  *("permanent-marker", "ubuntu-mono", "nunito"),
)
HELD_OUT_FONT = "lobster"
_SKIMAGE = "https://pypi.org/project/scikit-image"
_SKLEARN = "https://pypi.org/project/scikit-learn"
# Path in a wheel -> license, attribution, source. scikit-image documents them in `skimage.data`.
PHOTOGRAPHS = {
  "skimage/data/astronaut.png": ("public domain", "NASA", _SKIMAGE),
  "skimage/data/brick.png": ("CC0-1.0", "CC0Textures", _SKIMAGE),
  "skimage/data/camera.png": ("CC0-1.0", "Lav Varshney", _SKIMAGE),
  "skimage/data/chelsea.png": ("CC0-1.0", "Stefan van der Walt", _SKIMAGE),
  "skimage/data/clock_motion.png": ("public domain", "Stefan van der Walt", _SKIMAGE),
  "skimage/data/coffee.png": ("CC0-1.0", "Rachel Michetti", _SKIMAGE),
  "skimage/data/coins.png": ("public domain", "Brooklyn Museum", _SKIMAGE),
  "skimage/data/grass.png": ("CC0-1.0", "CC0Textures", _SKIMAGE),
  "skimage/data/gravel.png": ("CC0-1.0", "CC0Textures", _SKIMAGE),
  "skimage/data/hubble_deep_field.jpg": ("public domain", "NASA", _SKIMAGE),
  "skimage/data/rocket.jpg": ("public domain", "SpaceX", _SKIMAGE),
  "sklearn/datasets/images/china.jpg": ("CC-BY-2.0", "danielbuechele (flickr.com)", _SKLEARN),
  "sklearn/datasets/images/flower.jpg": ("CC-BY-2.0", "vultilion (flickr.com)", _SKLEARN),
}
HELD_OUT_PHOTOGRAPHS = ("skimage/data/chelsea.png", "sklearn/datasets/images/china.jpg")
GET = "\n  ".join(
  (
    f"npm pack @iconify-json/{{{','.join((*EMOJI, *ICONS, *ONE_COLOR, *HELD_OUT))}}}",
    f"npm pack @fontsource/{{{','.join((*FONTS, HELD_OUT_FONT))}}}",
    "apt-get download openclipart-svg",
    "pip download --no-deps scikit-image scikit-learn",
  )
)
_LARGEST = 100_000  # Bytes of an SVG text. Larger ones take seconds to draw.
_LEFT_OUT = re.compile(r"skin-tone|-(?:light|medium|dark)$|logo|brand|stripper|naked|nude|sex|coke")


@dataclasses.dataclass(frozen=True)
class Origin:
  """License, author and address of a picture."""

  license: str
  attribution: str
  source: str


@dataclasses.dataclass(frozen=True)
class Drawing:
  """A drawing: SVG text and origin. `kind` is "emoji", "icon", "clip art" or "one color"."""

  key: str  # Package and name, such as "noto/fire-engine".
  kind: str
  svg: str
  origin: Origin

  @property
  def package(self) -> str:
    return self.key.partition("/")[0]

  @property
  def name(self) -> str:
    return re.sub(r"[\W_]+", " ", self.key.partition("/")[2])


@dataclasses.dataclass(frozen=True)
class Font:
  """A font file in a format that FreeType reads."""

  name: str
  content: bytes
  origin: Origin


@dataclasses.dataclass(frozen=True)
class Photograph:
  name: str
  image: Image.Image
  origin: Origin


def find(folder: pathlib.Path, pattern: str) -> pathlib.Path:
  """Returns the newest file of a pattern. Raises `sets.SetError` if there is none."""
  if not (result := sorted(folder.glob(pattern))):
    raise sets.SetError(f"{folder} has no {pattern}; it needs the files of\n  {GET}")
  return result[-1]


def icons(found: Iterable[sets.IconSet], kind: str) -> Iterator[Drawing]:
  """Yields the drawings of sets, without skin tones and brands."""
  for about in found:
    origin = Origin(about.license, about.attribution, about.source)
    brands = about.of("Brand", "Logos")
    for name, svg in sorted(about.drawings.items()):
      if name not in brands and not _LEFT_OUT.search(name) and len(svg) <= _LARGEST:
        yield Drawing(f"{about.style}/{name}", kind, svg, origin)


def clip_art(folder: pathlib.Path) -> Iterator[Drawing]:
  """Yields the drawings of Debian's package openclipart-svg."""
  path = find(folder, "openclipart-svg_*.deb")
  unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", path], check=True, capture_output=True)
  origin = Origin(
    "public domain", "Open Clip Art Library", "https://packages.debian.org/openclipart-svg"
  )
  with tarfile.open(fileobj=io.BytesIO(unpacked.stdout)) as tar:
    for member in tar:
      name = member.name.partition("openclipart/svg/")[2].removesuffix(".svg")
      is_svg = member.isfile() and member.name.endswith(".svg") and member.size <= _LARGEST
      if is_svg and not _LEFT_OUT.search(name):
        svg = tar.extractfile(member).read().decode(errors="replace")
        yield Drawing(f"openclipart/{name}", "clip art", svg, origin)


def drawings(folder: pathlib.Path) -> list[Drawing]:
  """Reads the drawings of all packages, also those that are held out."""
  kinds = {"emoji": (*EMOJI, HELD_OUT[0]), "icon": (*ICONS, HELD_OUT[1]), "one color": ONE_COLOR}
  result = []
  for kind, packages in kinds.items():
    result += icons(sets.read(folder, {package: package for package in packages}), kind)
  return [*result, *clip_art(folder)]


def fonts(folder: pathlib.Path) -> list[Font]:
  """Reads the fonts, regular and Latin; the held-out font is the last."""
  result = []
  for name in (*FONTS, HELD_OUT_FONT):
    path = find(folder, f"fontsource-{name}-[0-9]*.tgz")
    with tarfile.open(path) as tar:
      content = tar.extractfile(f"package/files/{name}-latin-400-normal.woff").read()
      about = tar.extractfile("package/package.json").read().decode()
    license = re.search(r'"license": "([^"]+)"', about)[1]
    source = f"https://www.npmjs.com/package/@fontsource/{name}"
    result.append(Font(name, content, Origin(license, f"font {name}", source)))
  return result


def photographs(folder: pathlib.Path) -> list[Photograph]:
  """Reads the photographs that the wheels of scikit-image and scikit-learn contain."""
  result, wheels = [], collections.defaultdict(list)
  for name in PHOTOGRAPHS:
    wheels["scikit_image" if name.startswith("skimage") else "scikit_learn"].append(name)
  for wheel, names in wheels.items():
    with zipfile.ZipFile(find(folder, f"{wheel}-*.whl")) as files:
      for name in names:
        image = Image.open(io.BytesIO(files.read(name))).convert("RGB")
        result.append(Photograph(name, image, Origin(*PHOTOGRAPHS[name])))
  return result
