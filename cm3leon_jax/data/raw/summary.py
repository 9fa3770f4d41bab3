"""Computes statistics of raw records, and warnings about them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from cm3leon_jax.data.sources.records import RawInterleaved, RawPair, RawText, Record

REJECTED = "rejected_"  # Prefix of the rejection reasons among the names in a summary.
SUMS = ("train_caption_characters", "train_text_characters", "train_crops")


def of_record(record: Record, sizes: Sequence[tuple[int, int]]) -> dict:
  """Computes the statistics of a record. `sizes` are the original sizes of its images.

  Returns:
    train_caption_characters: number of characters in the caption of a training pair.
    train_text_characters: number of characters in the texts of a training record other than a pair.
    train_crops: 1 for an added crop, otherwise 0.
    fewest_caption_words, most_caption_words: number of words in the caption. 0 without a caption.
    smallest_image, largest_image: [width, height] of the source images with the fewest and the most
      pixels. [0, 0] without images.
  """
  caption = record.caption if isinstance(record, RawPair) else ""
  texts = [record.text] if isinstance(record, RawText) else []
  if isinstance(record, RawInterleaved):
    texts = [segment["text"] for segment in record.segments if "text" in segment]
  in_train, words = record.split == "train", len(caption.split())
  ordered = sorted(([w, h] for w, h in sizes), key=_pixels) or [[0, 0]]
  return {
    "train_caption_characters": len(caption) * in_train,
    "train_text_characters": sum(map(len, texts)) * in_train,
    "train_crops": int(isinstance(record, RawPair) and bool(record.added_crop)),
    "fewest_caption_words": words,
    "most_caption_words": words,
    "smallest_image": ordered[0],
    "largest_image": ordered[-1],
  }


def merged(statistics: Iterable[dict]) -> dict:
  """Merges the statistics of several records, see `of_record`."""
  result = list(statistics)
  words = [f["fewest_caption_words"] for f in result if f["fewest_caption_words"]]
  smallest = [f["smallest_image"] for f in result if f["smallest_image"] != [0, 0]]
  return {
    **{name: sum(f[name] for f in result) for name in SUMS},
    "fewest_caption_words": min(words, default=0),
    "most_caption_words": max((f["most_caption_words"] for f in result), default=0),
    "smallest_image": min(smallest, key=_pixels, default=[0, 0]),
    "largest_image": max((f["largest_image"] for f in result), key=_pixels, default=[0, 0]),
  }


def _pixels(size: Sequence[int]) -> tuple[int, int]:
  return size[0] * size[1], size[0]


def warnings(summary: Mapping) -> Iterator[str]:
  """Yields warnings about missing data that a later stage needs."""
  pairs = {split: summary.get(f"{split}_pairs", 0) for split in ("train", "heldout", "bank")}
  if not any(pairs.values()):
    yield (
      "0 pairs, so no image has a caption, and no image tokenizer can be trained: put the caption "
      "of x.jpg into x.txt in the same folder, or list images and captions in pairs.jsonl."
    )
  elif not pairs["train"] or not pairs["heldout"]:
    split = "train" if not pairs["train"] else "heldout"
    yield (
      f"0 pairs in the split '{split}', but the image tokenizer needs both splits: change "
      "config.raw.heldout_fraction, or add pairs."
    )
