"""Reads images, and raw folders that `ingest.prepare` wrote (see docs/workdir.md)."""

from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
import contextlib
import ctypes
import dataclasses
import functools
import threading
import traceback
from typing import IO

from etils import epath
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cm3leon_jax.data.raw.image_parts import ImageFile
from cm3leon_jax.data.sources.records import (
  KINDS,
  RawPair,
  RawText,
  RecordError,
  T,
  images_of,
  make_record,
  parse_json,
  required_fields,
  with_images,
)
from cm3leon_jax.errors import UserError, causes
from cm3leon_jax.files.atomic import exists, open_filesystem
from cm3leon_jax.files.images import upright_rgb
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.files.rewritten import damage
from cm3leon_jax.stages import stages

# B images, H height, W width.

INDEX = "index.json"
IMAGE_DIGESTS = "images.sha256"  # File of image digests, in the format of `sha256sum`.
SCHEMA_VERSION = 1
IN_MEMORY_BYTES = 2**31
# The decoders of other formats may start programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "AVIF", "BMP", "TIFF")
MAX_BYTES = 2**26  # Maximum size of an image file in bytes.
# Maximum number of pixels per image. Scaling an image of this size takes 0.7 GB of memory.
MAX_PIXELS = 2**25
# JPEG files may have more, because they are decoded at half their size. Pillow warns above it.
MAX_JPEG_PIXELS = 89_000_000
LARGE = 2**22  # Images with more pixels are read one at a time.
_ONE_LARGE_IMAGE = threading.Lock()


def shards(folder: epath.PathLike) -> dict[str, dict]:
  """Returns {name of a shard: counts and digest of its records}, in the order of the shards."""
  return read_index(folder)["shards"]


def read_index(folder: epath.PathLike) -> dict:
  """Reads the index of a raw folder.

  Returns:
    shards: see `shards`.
    origins: number of records by kind, source, license and attribution.

  Raises:
    UserError: the index is missing, is damaged, or has another schema version.
  """
  path = epath.Path(folder) / INDEX
  if not path.exists():
    raise UserError(
      f"{path} does not exist: run `cm3leon prepare_data` with the same --config and "
      "--workdir first."
    )
  stages.check_files(path)
  index = read_json(path, {"schema_version": int, "origins": list, "shards": dict})
  if index["schema_version"] != SCHEMA_VERSION:
    raise UserError(
      f"{path} has schema version {index['schema_version']}; this code reads version "
      f"{SCHEMA_VERSION}: run `cm3leon prepare_data` again."
    )
  return index


def read_pairs(folder: epath.PathLike, split: str) -> list[RawPair]:
  """Reads the pairs of a split in the order of the shards. Converts image names to full paths."""
  return [pair for name in shards(folder) for pair in read_shard(folder, name, RawPair, split)]


def read_captions(folder: epath.PathLike) -> list[str]:
  """Reads the captions of all training pairs. Skips added crops, which repeat captions."""
  return [pair.caption for pair in read_pairs(folder, "train") if not pair.added_crop]


def read_texts(folder: epath.PathLike, split: str) -> list[RawText]:
  """Reads the texts of a split in the order of the shards."""
  return [text for name in shards(folder) for text in read_shard(folder, name, RawText, split)]


def read_shard(folder: epath.PathLike, name: str, cls: type[T], split: str) -> list[T]:
  """Reads the records of type `cls` in one split of shard `name`. Images are full paths."""
  described, file = described_files(folder, name), f"{kind_of(cls)}.jsonl"
  folder = epath.Path(folder) / name
  if file in described:
    check_file(folder, file, described[file])
  records = [r for r in _read(folder / file, cls) if r.split == split]
  return [with_images(r, [str(folder / image) for image in images_of(r)]) for r in records]


def described_files(folder: epath.PathLike, name: str) -> dict[str, dict]:
  """Returns the size and SHA-256 digest of each file of a shard, or {} if they are not stored."""
  about = epath.Path(folder) / "done" / f"{name}.json"
  return read_json(about, {"summary": dict})["summary"].get("files", {}) if exists(about) else {}


def check_file(shard: epath.Path, file: str, expected: dict) -> None:
  """Raises UserError if a file of a shard is missing, or its size or digest is wrong."""
  if wrong := damage(shard / file, expected):
    raise UserError(f"{shard / file} {wrong}: {again(shard)}.")


def again(shard: epath.Path) -> str:
  """Returns the end of an error message, which says how to replace a damaged file of a shard."""
  return stages.again(shard.parent, f"the folder {shard}")


def kind_of(cls: type) -> str:
  """Returns the name of a kind of record: kind_of(RawPair) = "pairs"."""
  return next(kind for kind, record in KINDS.items() if record is cls)


def _read(path: epath.Path, cls: type[T]) -> Iterator[T]:
  """Yields the records of a file that `ingest.prepare` wrote."""
  if not path.exists():
    raise UserError(
      f"{path} does not exist, although {INDEX} lists its shard: run `cm3leon prepare_data` again."
    )
  for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
    if line:
      where = f"{path}, line {number}"
      try:
        yield make_record(cls, parse_json(line, where, required_fields(cls)), where)
      except RecordError as error:
        raise UserError(str(error)) from error


def load_image(
  image: str | bytes | epath.Path, resolution: int | None, crop: str = "center"
) -> np.ndarray:
  """Returns the pixels of an image, [H, W, 3] uint8. For details, see `load_with_size`."""
  return load_with_size(image, resolution, crop)[0]


def load_with_size(
  image: str | bytes | epath.Path, resolution: int | None, crop: str = "center"
) -> tuple[np.ndarray, tuple[int, int]]:
  """Reads an image, rotates it upright, puts it on white, and scales it to a square.

  Reads the first frame of an animation. Images may come from untrusted sources, so file sizes and
  pixel counts are limited, and large images are read one at a time.

  Args:
    resolution: side of the result in pixels. None keeps the size of the image.
    crop: "center" or "pad", see `RawConfig.crop`.

  Returns:
    The pixels, [H, W, 3] uint8, and the (width, height) of the upright image before scaling.

  Raises:
    UserError: the file is missing, is not a regular file, is damaged, has a format that is not in
      FORMATS, or exceeds MAX_BYTES or MAX_PIXELS.
  """
  name = f"of {len(image)} bytes" if isinstance(image, bytes) else str(image)
  try:
    with open_image(image, name) as file:
      return _decode(file, name, resolution, crop)
  except Exception as error:  # Decoders raise many kinds of errors for damaged files.
    for cause in causes(error):  # The frames of a stored error would keep the image in memory.
      traceback.clear_frames(cause.__traceback__)
    if isinstance(error, UserError):
      raise
    raise UserError(
      f"image {name} cannot be read ({error}); it must be a PNG, JPEG, WebP, GIF, AVIF, BMP or "
      "TIFF file."
    ) from error


def _decode(
  file: IO[bytes], name: str, resolution: int | None, crop: str
) -> tuple[np.ndarray, tuple[int, int]]:
  """Decodes the image in an open file. For results and errors, see `load_with_size`."""
  try:
    opened = Image.open(file, formats=FORMATS)
  except UnidentifiedImageError as error:  # The message of this error does not name the file.
    raise ValueError(_other_format(file)) from error
  pixels = opened.width * opened.height
  most = MAX_JPEG_PIXELS if opened.format == "JPEG" else MAX_PIXELS
  if pixels > most:
    raise UserError(f"image {name} has {pixels:,} pixels; the maximum is {most:,}.")
  if pixels <= LARGE:
    return square(upright_rgb(opened), resolution, crop)
  del opened  # Frees the file content before this thread waits for the lock.
  with _one_at_a_time():
    file.seek(0)
    opened = Image.open(file, formats=FORMATS)
    if pixels <= MAX_PIXELS:
      return square(upright_rgb(opened), resolution, crop)
    opened.draft(None, (opened.width // 2, opened.height // 2))
    array, (width, height) = square(upright_rgb(opened), resolution, crop)
    return array, (2 * width, 2 * height)  # Within a pixel of the size in the file.


def _other_format(file: IO[bytes]) -> str:
  """Returns the reason why Pillow does not know the format of a file."""
  file.seek(0)
  start = file.read(12)
  if start[4:8] == b"ftyp" and start[8:11] in (b"hei", b"hev", b"mif", b"msf"):
    return "it is a HEIC file: convert it to JPEG"
  return "its content has another format" if start else "the file is empty"


def square(
  pixels: Image.Image, resolution: int | None, crop: str
) -> tuple[np.ndarray, tuple[int, int]]:
  """Scales an image to a square of `resolution`. Returns its pixels, and its size before."""
  size = pixels.size
  if resolution and size != (resolution, resolution):
    squares: dict[str, Callable[..., Image.Image]] = {
      "center": ImageOps.fit,
      "pad": functools.partial(ImageOps.pad, color="white"),
    }
    pixels = squares[crop](pixels, (resolution, resolution), Image.Resampling.LANCZOS)
  return np.asarray(pixels), size


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
  """Lets one thread at a time read a large image. Returns freed memory to the system.

  When a thread frees memory, glibc keeps it for this thread: 0.4 GB after a large image. If
  decoding fails, the memory is freed only after the error was handled. In that case, the trim
  before the next image returns the memory to the system.
  """
  with _ONE_LARGE_IMAGE:
    _trim_memory()
    yield
    _trim_memory()


def _trim_memory() -> None:
  if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # Only glibc has this function.
    trim(0)


def open_image(image: str | bytes | epath.Path, name: str) -> IO[bytes]:
  """Reads a file, or opens bytes.

  Raises UserError if it is not a regular file, is too large, or has too many parts: `image_parts`.
  """
  if isinstance(image, bytes):
    size = len(image)
  else:
    fs, path = open_filesystem(str(image))
    info = fs.info(path)
    if info["type"] == "directory":
      raise UserError(f"image {name} is a folder; name an image file in it.")
    if info["type"] != "file":
      raise UserError(f"image {name} cannot be read (it is not a file).")
    size = info["size"]
  if size > MAX_BYTES:
    raise UserError(f"image {name} has {size:,} bytes; the maximum is {MAX_BYTES:,}.")
  if not isinstance(image, bytes):
    with fs.open(path, "rb", cache_type="none") as file:
      image = file.read(size)
  return ImageFile(image, f"image {name}")


def load_images(
  paths: Iterable[epath.PathLike], resolution: int | None, num_threads: int, crop: str = "center"
) -> np.ndarray:
  """Reads images in several threads. Returns [B, H, W, 3] uint8; see `load_image`."""
  with futures.ThreadPoolExecutor(num_threads) as pool:
    images = list(pool.map(lambda path: load_image(path, resolution, crop), paths))
  side = resolution or 0
  return np.stack(images) if images else np.zeros((0, side, side, 3), np.uint8)


@dataclasses.dataclass(frozen=True)
class ImageFiles:
  """Images on disk. `files[rows]` reads the images with the indices `rows`, [B, H, W, 3] uint8."""

  paths: list
  resolution: int
  num_threads: int = 8

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, rows: np.ndarray) -> np.ndarray:
    return load_images([self.paths[i] for i in rows], self.resolution, self.num_threads)


def in_memory(files: ImageFiles) -> np.ndarray | ImageFiles:
  """Returns all images as an array if they fit into 2 GiB. Otherwise returns `files`."""
  small = len(files) * files.resolution**2 * 3 <= IN_MEMORY_BYTES
  return files[np.arange(len(files))] if small else files


def open_images(folder: epath.PathLike, split: str, resolution: int) -> np.ndarray | ImageFiles:
  """Opens the images of one split of a raw folder, in the order of the pairs. See `in_memory`.

  Raises:
    UserError: the split has no pairs, or an image cannot be read.
  """
  files = ImageFiles([pair.image for pair in read_pairs(folder, split)], resolution)
  if not len(files):
    raise UserError(
      f"{folder} has no {split} pairs, but the tokenizer needs pairs of both splits: "
      "change config.raw.heldout_fraction."
    )
  return in_memory(files)
