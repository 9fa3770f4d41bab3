"""Raw pairs and texts -> documents of token ids, with the counts that tell whether the tokenizers fit the data."""

from collections.abc import Iterator

from etils import epath
import numpy as np
from tqdm import tqdm

from cm3leon_jax.config import UserError
from cm3leon_jax.data import raw_pairs
from cm3leon_jax.data.documents import Document, Segment, write_documents
from cm3leon_jax.tokenizers.text import TextTokenizer
from cm3leon_jax.vocab import VocabLayout

# B images at a time, H height, W width, T tokens of a text, I codes of an image, C `image_size` different codes.


def encode_documents(
  raw: epath.PathLike,
  text_tokenizer: TextTokenizer,
  image_tokenizer,
  vocab: VocabLayout,
  resolution: int,
  max_caption_tokens: int,
  folder: epath.PathLike,
  batch_size: int = 128,
  num_threads: int = 8,
) -> dict:
  """Writes the stores `folder/{train,heldout}_{pairs,texts}`; schema in docs/data_formats.md.

  Document i of `{split}_pairs` is the i-th pair of that split in pairs.jsonl: caption, then image.

  Args:
    raw: what `raw_pairs.prepare` wrote.
    text_tokenizer: encodes captions and texts.
    image_tokenizer: `encode`: [B, H, W, 3] uint8 -> [B, I] int32 codes below `vocab.image_size`, in raster order.
    vocab: ids of both.
    resolution: H = W of the images that `image_tokenizer` takes.
    max_caption_tokens: longer captions lose their end; the summary counts them.
    folder: of the four stores.
    batch_size: images encoded at a time.
    num_threads: image files read at a time.

  Returns:
    The summary: per split documents, tokens, cut captions, and how the codes are used (`code_usage`).

  Raises:
    UserError: a code outside the vocabulary, or a split `train` without pairs and texts.
  """
  folder, summary = epath.Path(folder), {}
  for split in raw_pairs.SPLITS:
    pairs, texts = raw_pairs.read_pairs(raw, split), raw_pairs.read_texts(raw, split)
    if split == "train" and not pairs and not texts:
      raise UserError(f"{raw} has no pair and no text with split 'train'; a smaller raw.heldout_fraction leaves some.")
    captions = text_tokenizer.encode_batch(pair.caption for pair in pairs)
    counts = np.zeros(vocab.image_size, np.int64)
    images = _codes(pairs, image_tokenizer, vocab, resolution, batch_size, num_threads, split)
    written = write_documents(
      folder / f"{split}_pairs", _pairs(pairs, captions, images, max_caption_tokens, vocab, counts), vocab
    )
    ids = text_tokenizer.encode_batch(record.text for record in texts)
    write_documents(folder / f"{split}_texts", _texts(texts, ids), vocab)
    summary[split] = {
      "pairs": written,
      "texts": len(texts),
      "caption_tokens": sum(min(len(caption), max_caption_tokens) for caption in captions),
      "captions_cut": sum(len(caption) > max_caption_tokens for caption in captions),
      "longest_caption": max(map(len, captions), default=0),
      "image_tokens": int(counts.sum()),
      "text_tokens": sum(map(len, ids)),
      **code_usage(counts),
    }
  return summary


def code_usage(counts: np.ndarray) -> dict:
  """How evenly image codes are used.

    counts = [2, 2, 0, 0]: codes_used 2, code_entropy_bits 1.0, code_perplexity 2.0

  Args:
    counts: [C] ints, occurrences of every code.

  Returns:
    Number of codes that occur, their unigram entropy in bits, and its perplexity (C for even use, 1 for a single code).
  """
  used = counts[counts > 0] / max(counts.sum(), 1)
  bits = float(-(used * np.log2(used)).sum()) + 0.0
  return {"codes_used": len(used), "code_entropy_bits": bits, "code_perplexity": 2**bits}


def _codes(pairs, image_tokenizer, vocab, resolution, batch_size, num_threads, split) -> Iterator[np.ndarray]:
  """Yields [I] int32 codes for every pair, with a progress bar."""
  with tqdm(total=len(pairs), desc=f"{split} images", mininterval=1, unit="image") as progress:
    for start in range(0, len(pairs), batch_size):
      part = pairs[start : start + batch_size]
      images = raw_pairs.load_images([pair.image for pair in part], resolution, num_threads)
      codes = np.asarray(image_tokenizer.encode(images), np.int32)
      if codes.min() < 0 or codes.max() >= vocab.image_size:
        raise UserError(
          f"the image tokenizer gives codes in [{codes.min()}, {codes.max()}]; config.vocab.image_size is {vocab.image_size}: "
          "train it with the same config."
        )
      yield from codes
      progress.update(len(part))


def _pairs(pairs, captions, images, max_caption_tokens, vocab, counts) -> Iterator[Document]:
  """Yields caption-image documents and adds their codes to `counts` ([C] int64)."""
  for pair, caption, codes in zip(pairs, captions, images, strict=True):
    np.add.at(counts, codes, 1)
    segments = (Segment(False, caption[:max_caption_tokens]), Segment(True, vocab.image_ids(codes)))
    yield Document(pair.key, segments, pair.source, pair.license, pair.attribution, pair.group)


def _texts(texts, ids) -> Iterator[Document]:
  for record, tokens in zip(texts, ids, strict=True):
    yield Document(record.key, (Segment(False, tokens),), record.source, record.license, record.attribution)
