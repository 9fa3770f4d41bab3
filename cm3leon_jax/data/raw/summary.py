"""Computes statistics of raw records. Describes a raw folder in a sentence."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from cm3leon_jax.data.sources.records import NOTES, RawInterleaved, RawPair, RawText, Record

# Kind of record -> its singular and plural name.
NAMES = {
  "pairs": ("pair", "pairs"),
  "texts": ("text", "texts"),
  "interleaved": ("interleaved document", "interleaved documents"),
}
# Reason for a rejection -> its singular and plural description.
REASONS = {
  "unknown_suffix": ("image with an unknown suffix", "images with unknown suffixes"),
  "missing_caption": ("image without a caption", "images without a caption"),
  "empty_caption": ("empty caption", "empty captions"),
  "long_caption": ("caption that is too long", "captions that are too long"),
  "missing_image": ("caption without an image", "captions without an image"),
  "unreadable_image": ("image that cannot be read", "images that cannot be read"),
  "outside_image": ("image outside the folder", "images outside the folder"),
  "linked_file": ("file that is a link", "files that are links"),
  "empty_text": ("empty text", "empty texts"),
  "malformed_record": ("malformed record", "malformed records"),
  "duplicate_key": ("key that occurs twice", "keys that occur twice"),
  "unreadable_file": ("file that cannot be read", "files that cannot be read"),
  "large_file": ("file that is too large", "files that are too large"),
  "conflicting_captions": ("second caption that differs", "second captions that differ"),
  "image_of_same_name": ("second image of the same name", "second images of the same name"),
}
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
  found = list(statistics)
  words = [f["fewest_caption_words"] for f in found if f["fewest_caption_words"]]
  smallest = [f["smallest_image"] for f in found if f["smallest_image"] != [0, 0]]
  return {
    **{name: sum(f[name] for f in found) for name in SUMS},
    "fewest_caption_words": min(words, default=0),
    "most_caption_words": max((f["most_caption_words"] for f in found), default=0),
    "smallest_image": min(smallest, key=_pixels, default=[0, 0]),
    "largest_image": max((f["largest_image"] for f in found), key=_pixels, default=[0, 0]),
  }


def _pixels(size: Sequence[int]) -> tuple[int, int]:
  return size[0] * size[1], size[0]


def sentence(summary: Mapping, resolution: int) -> str:
  """Describes the result of `ingest.prepare` in words.

  Returns:
    "279 pairs for training, 21 held out; images of 256 x 256 become 64 x 64; captions of 4 to 31
    words; 5 records set aside: 3 images without a caption, 2 empty captions"
  """
  said = [text for kind in NAMES if (text := _records(summary, kind))]
  if summary["largest_image"] != [0, 0]:
    square = [resolution, resolution]
    sizes = _range(*(_size(summary[f"{which}_image"]) for which in ("smallest", "largest")))
    scaled = f" become {_size(square)}"
    unchanged = summary["smallest_image"] == summary["largest_image"] == square
    said.append(f"images of {sizes}{'' if unchanged else scaled}")
  if most := summary["most_caption_words"]:
    words = _range(f"{summary['fewest_caption_words']:,}", f"{most:,}")
    said.append(f"captions of {words} word{'' if most == 1 else 's'}")
  if licenses := summary.get("other_licenses"):
    said.append(f"{licenses:,} left out because of their licenses")
  rejected = {
    name.removeprefix(REJECTED): n for name, n in summary.items() if name.startswith(REJECTED)
  }
  if total := sum(rejected.values()):
    said.append(f"{_number(total, 'record', 'records')} set aside: {_reasons(rejected)}")
  if notes := _reasons({r: summary.get(r, 0) for r in NOTES}):
    said.append(f"not used: {notes}")
  return "; ".join(said)


def _reasons(counts: Mapping[str, int]) -> str:
  """Lists reasons, most frequent first: "2 empty captions, 1 image without a caption"."""
  ordered = sorted(counts.items(), key=lambda item: -item[1])
  return ", ".join(_number(n, *REASONS[reason]) for reason, n in ordered if n)


def _records(summary: Mapping, kind: str) -> str:
  """Describes the number of records of a kind: "279 pairs for training, 21 held out"."""
  train, heldout, bank = (summary.get(f"{s}_{kind}", 0) for s in ("train", "heldout", "bank"))
  if not train + heldout + bank and kind != "pairs":
    return ""
  crops = summary.get("train_crops", 0) if kind == "pairs" else 0
  said = f"{_number(train - crops, *NAMES[kind])} for training"
  said = f"{said} and {_number(crops, 'crop', 'crops')} of them" if crops else said
  said = f"{said}, {heldout:,} held out"
  return f"{said}, {bank:,} only for retrieval" if bank else said


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


def _number(count: int, one: str, several: str) -> str:
  return f"{count:,} {one if count == 1 else several}"


def _range(least: str, most: str) -> str:
  return least if least == most else f"{least} to {most}"


def _size(size: Sequence[int]) -> str:
  return f"{size[0]} x {size[1]}"
