"""Encodes raw shards into document shards of token ids, and counts tokens and codes."""

import collections
from collections.abc import Callable, Iterable, Iterator
import dataclasses
from typing import Any

from etils import epath
import numpy as np

from cm3leon_jax.data.documents.shard_files import shards_with_files
from cm3leon_jax.data.documents.store import Document, Segment, finish_store, write_shard
from cm3leon_jax.data.raw import reader
from cm3leon_jax.data.sources.records import KINDS, SPLITS, RawPair, Record, images_of
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.progress import progress_bar
from cm3leon_jax.stages.shards import Runner, run_shards
from cm3leon_jax.tokenizers.text import TextTokenizer
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from cm3leon_jax.vocab import VocabLayout

# B images per batch, H height, W width, I codes per image, C size of the codebook.


@dataclasses.dataclass(frozen=True)
class EncodeJob:
  """A job for `shards.run_shards`, which encodes raw shards as document shards.

  Attributes:
    load_tokenizers: function that returns a text tokenizer and an image tokenizer. The method
      `encode` of the image tokenizer converts images, [B, H, W, 3] uint8, to codes, [B, I] int32,
      in raster order.
    resolution: side of the square images for the image tokenizer, in pixels.
    max_caption_tokens: maximum length of a caption. Longer captions are cut, and the summary says
      how many captions were cut.
  """

  raw: str
  folder: str
  load_tokenizers: Callable[[], tuple]
  vocab: VocabLayout
  resolution: int
  max_caption_tokens: int
  batch_size: int = 128
  num_threads: int = 8

  def open(self) -> Callable[[str], dict]:
    """Loads the tokenizers. Returns a function that encodes the shard with a given name."""
    text_tokenizer, image_tokenizer = self.load_tokenizers()

    def encode_shard(name: str) -> dict:
      return {
        split: self._encode_split(name, split, text_tokenizer, image_tokenizer) for split in SPLITS
      }

    return encode_shard

  def _encode_split(
    self, name: str, split: str, text_tokenizer: TextTokenizer, image_tokenizer: ImageTokenizer
  ) -> dict[str, Any]:
    """Encodes a split of a shard. Returns counts by kind of record, and counts of codes, [C]."""
    code_counts = np.zeros(self.vocab.image_size, np.int64)
    summary = {}
    for kind, cls in KINDS.items():
      records = reader.read_shard(self.raw, name, cls, split)
      texts = text_tokenizer.encode_batch(text for record in records for text in texts_of(record))
      counts = {"documents": len(records)}
      if cls is RawPair:
        most = self.max_caption_tokens
        counts |= {
          "captions_cut": sum(len(text) > most for text in texts),
          "longest_caption": max(map(len, texts), default=0),
        }
        texts = [text[:most] for text in texts]
      summary[kind] = {**counts, "text_tokens": sum(map(len, texts))}
      images = [image for record in records for image in images_of(record)]
      codes = self._codes(images, image_tokenizer, f"{split} {name}")
      documents = documents_of(records, iter(texts), codes, self.vocab, code_counts)
      write_shard(epath.Path(self.folder) / f"{split}_{kind}", name, documents, self.vocab)
    return {**summary, "code_counts": code_counts.tolist()}

  def _codes(
    self, images: list[str | bytes], image_tokenizer: ImageTokenizer, bar: str
  ) -> Iterator[np.ndarray]:
    """Yields the codes of every image, [I] int32. `bar` is the label of the progress bar."""
    with progress_bar(
      total=len(images), desc=bar, unit="image", leave=False, disable=not images
    ) as progress:
      for start in range(0, len(images), self.batch_size):
        paths = images[start : start + self.batch_size]
        batch = reader.load_images(paths, self.resolution, self.num_threads)
        codes = np.asarray(image_tokenizer.encode(batch), np.int32)
        if codes.min() < 0 or codes.max() >= self.vocab.image_size:
          raise UserError(
            f"the image tokenizer returns codes in [{codes.min()}, {codes.max()}], but "
            f"config.vocab.image_size is {self.vocab.image_size}: train it with the same config."
          )
        yield from codes
        progress.update(len(paths))


def texts_of(record: Record) -> list[str]:
  """Returns the texts of a record in reading order."""
  if hasattr(record, "segments"):
    return [segment["text"] for segment in record.segments if "text" in segment]
  return [record.caption if isinstance(record, RawPair) else record.text]


def documents_of(
  records: Iterable[Record],
  texts: Iterator[np.ndarray],
  codes: Iterator[np.ndarray],
  vocab: VocabLayout,
  counts: np.ndarray,
) -> Iterator[Document]:
  """Yields one document per record. Counts the codes of its images in `counts`, [C] int64."""
  for record in records:
    kinds = [False] + [True] * isinstance(record, RawPair)
    if hasattr(record, "segments"):
      kinds = ["image" in segment for segment in record.segments]
    segments = []
    for is_image in kinds:
      tokens = next(codes) if is_image else next(texts)
      if is_image:
        np.add.at(counts, tokens, 1)
        tokens = vocab.image_ids(tokens)
      segments.append(Segment(is_image, tokens))
    group = getattr(record, "group", "")
    concept = getattr(record, "concept", "") or group
    facts = getattr(record, "facts", {})
    about = (record.source, record.license, record.attribution, group, concept, facts)
    yield Document(record.key, tuple(segments), *about)


def load_tokenizers(
  workdir: epath.PathLike, vocab: VocabLayout
) -> tuple[TextTokenizer, ImageTokenizer]:
  """Loads the tokenizers that the run in `workdir` trained."""
  workdir = epath.Path(workdir)
  return TextTokenizer(workdir / "text_tokenizer", vocab), ImageTokenizer.load(workdir / "vqgan")


def encode_documents(job: EncodeJob, inputs: dict, runner: Runner) -> dict:
  """Writes a store `{split}_{kind}` for each split and kind of record (see docs/workdir.md).

  Document i of a store is record i of the same split and kind in the raw folder. `inputs` contains
  the ids of the tokenizers. If one of these ids changes, all shards are encoded again.

  Returns for each split: the number of documents by kind, the number of tokens, the number of cut
  captions, and the result of `code_usage`.

  Raises:
    UserError: a code is outside the vocabulary, all images have the same single code, or the split
      `train` has no records.
  """
  raw = reader.shards(job.raw)
  if not any(shard[f"train_{kind}"] for shard in raw.values() for kind in KINDS):
    raise UserError(f"{job.raw} has no record in the split 'train': lower raw.heldout_fraction.")
  config = {
    "inputs": inputs,
    "splits": SPLITS,
    "vocab": job.vocab.sizes,
    "max_caption_tokens": job.max_caption_tokens,
  }
  configs = {
    name: {**config, "resolution": job.resolution, "digest": shard["digest"]}
    for name, shard in raw.items()
  }
  folder = epath.Path(job.folder)
  totals = {split: _Totals(job.vocab.image_size) for split in SPLITS}
  is_whole = shards_with_files(folder / f"{split}_{kind}" for split in SPLITS for kind in KINDS)
  done = folder / "done"
  for _, summary in run_shards(job, configs, done, runner, "document shards", is_whole):
    for split, total in totals.items():
      total.add(summary[split])
  used = totals["train"].summary()
  if used["image_tokens"] and used["codes_used"] == 1 < job.vocab.image_size:
    raise UserError(
      f"the image tokenizer assigns the same code to all {used['image_tokens']} cells of the "
      "training images: train it again, longer (config.vqgan.steps) or with another "
      "config.vqgan.learning_rate."
    )
  for split in SPLITS:
    for kind in KINDS:
      finish_store(folder / f"{split}_{kind}", list(raw), job.vocab)
  return {split: total.summary() for split, total in totals.items()}


class _Totals:
  """Sums the counts of one split over shards."""

  def __init__(self, num_codes: int):
    self._codes = np.zeros(num_codes, np.int64)
    self._counts: collections.Counter[str] = collections.Counter()
    self._longest = 0

  def add(self, shard: dict) -> None:
    self._codes += np.array(shard["code_counts"])
    for kind in KINDS:
      self._counts.update({f"{kind}.{name}": value for name, value in shard[kind].items()})
    self._longest = max(self._longest, shard["pairs"]["longest_caption"])

  def summary(self) -> dict:
    total = self._counts
    return {
      **{kind: total[f"{kind}.documents"] for kind in KINDS},
      "caption_tokens": total["pairs.text_tokens"],
      "captions_cut": total["pairs.captions_cut"],
      "longest_caption": self._longest,
      "image_tokens": int(self._codes.sum()),
      "text_tokens": total["texts.text_tokens"] + total["interleaved.text_tokens"],
      **code_usage(self._codes),
    }


def code_usage(counts: np.ndarray) -> dict:
  """Computes codebook usage from the number of occurrences of each code: `counts`, [C] integers.

    counts = [2, 2, 0, 0]: codes_used 2, code_entropy_bits 1.0, code_perplexity 2.0

  Returns:
    The number of codes that occur, their unigram entropy in bits, and their perplexity. The
    perplexity is C if all codes are equally frequent, and 1 if only one code occurs.
  """
  used = counts[counts > 0] / max(counts.sum(), 1)
  bits = float(-(used * np.log2(used)).sum()) + 0.0
  return {"codes_used": len(used), "code_entropy_bits": bits, "code_perplexity": 2**bits}
