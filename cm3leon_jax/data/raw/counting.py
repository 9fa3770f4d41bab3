"""Measures sources and raw folders, from which some config fields are computed."""

from collections.abc import Iterable, Iterator, Mapping
import itertools
import statistics
import warnings

from etils import epath
from PIL import Image

from cm3leon_jax.config.tokenizers import TextTokenizerConfig
from cm3leon_jax.data.raw import reader
from cm3leon_jax.data.sources import formats
from cm3leon_jax.data.sources.records import RawPair
from cm3leon_jax.errors import UserError
from cm3leon_jax.stages.from_data import MOST_TEXT_TOKENS, Counts
from cm3leon_jax.tokenizers.text import supported_tokens
from cm3leon_jax.vocab import VocabLayout

SIDES = (24, 48)  # Side lengths of images in pixels with which a model trains in minutes.
IMAGES = 200  # Number of images that are opened to choose between `SIDES`.
PAIRS = 3_200  # Desired number of pairs, including crops.
CHOSEN_CROPS = 99  # Largest number of crops per image that is chosen; a user may set more.
CHARACTERS = 2**24  # Number of characters of captions and texts in which tokens are counted.


def resolution_of(parts: list[formats.SourcePart], allow_outside: bool = False) -> int:
  """Returns the largest of `SIDES` that does not exceed the median side of the first images.

  The side of an image is its shorter side. Returns the smallest of `SIDES` if the median is below
  all of them, and the largest if no image is readable. Unreadable images are rejected later.
  """
  warnings.filterwarnings("ignore", module="PIL")  # May be thousands for an image.
  records = itertools.chain.from_iterable(formats.read(part, allow_outside) for part in parts)
  pairs = (record for record in records if isinstance(record, RawPair))
  sides = [side for pair in itertools.islice(pairs, IMAGES) for side in _side(pair)]
  median = statistics.median(sides) if sides else SIDES[-1]
  return max((side for side in SIDES if side <= median), default=SIDES[0])


def crops_of(parts: list[formats.SourcePart], allow_outside: bool = False) -> int:
  """Returns the number of crops per image that gives a small source about `PAIRS` pairs.

  The result is at most `CHOSEN_CROPS`. It is 0 for a source without pairs, which is rejected later.
  """
  records = itertools.chain.from_iterable(formats.read(part, allow_outside) for part in parts)
  pairs = (record for record in records if isinstance(record, RawPair))
  count = sum(1 for _ in itertools.islice(pairs, PAIRS))
  return min(CHOSEN_CROPS, PAIRS // count - 1) if count else 0


def _side(pair: RawPair) -> Iterator[int]:
  """Yields the shorter side of an image, or nothing if the image cannot be read."""
  try:
    with (
      reader.open_image(pair.image, pair.key) as file,
      Image.open(file, formats=reader.FORMATS) as image,
    ):
      yield min(image.size)
  except (OSError, ValueError, UserError, Image.DecompressionBombError):
    return


def counts_of(
  folder: epath.PathLike,
  summary: Mapping,
  resolution: int,
  num_special: int,
  config: TextTokenizerConfig,
) -> Counts:
  """Computes the largest text vocabulary that the texts support. Copies the counts of `summary`.

  `summary` is the result of `ingest.prepare`.
  """
  largest = VocabLayout(num_special=num_special, text_size=MOST_TEXT_TOKENS)
  captions = reader.read_captions(folder)
  texts = (record.text for record in reader.read_texts(folder, "train"))
  return Counts(
    resolution=resolution,
    pairs=summary["train_pairs"],
    texts=summary["train_texts"],
    heldout_texts=summary["heldout_texts"],
    caption_characters=summary["train_caption_characters"],
    text_characters=summary["train_text_characters"],
    text_tokens=supported_tokens(_first(itertools.chain(captions, texts)), largest, config),
  )


def _first(texts: Iterable[str]) -> Iterator[str]:
  """Yields texts until their total length reaches `CHARACTERS` characters."""
  left = CHARACTERS
  for text in texts:
    if left <= 0:
      return
    left -= len(text)
    yield text
