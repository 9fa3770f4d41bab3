"""Erases documents of the bank from the folders raw, documents and neighbors of a run.

An erased document keeps its place and the lengths of its segments, so that the rows of a training
do not change. Its tokens are the first ids of their kinds, and its image is black.
"""

import io
import json
import re

from etils import epath
import numpy as np
from PIL import Image

from cm3leon_jax.config.build import build
from cm3leon_jax.config.data import RetrievalConfig
from cm3leon_jax.data.documents.store import Bank, Document, Segment, write_shard
from cm3leon_jax.data.raw import reader
from cm3leon_jax.data.sources.records import RawPair
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.atomic import exists, replacing
from cm3leon_jax.files.digests import digest
from cm3leon_jax.files.rewritten import rewriting
from cm3leon_jax.retrieval.arrays import ArrayStore
from cm3leon_jax.retrieval.neighbors import Retriever
from cm3leon_jax.stages import stages
from cm3leon_jax.vocab import VocabLayout

ERASED = "erased"  # Key and caption of an erased pair in raw/.


def erase(workdir: epath.PathLike, rows: np.ndarray) -> None:
  """Erases the documents in `rows` of the bank. A repeated call completes one that was killed.

  Raises UserError if a file is damaged, or raw/ and documents/ do not belong to the bank.
  """
  workdir = epath.Path(workdir)
  documents, neighbors = (
    stages.require(workdir, name, config=dict)["config"] for name in ("documents", "neighbors")
  )
  has_raw, read = exists(workdir / "raw"), {x["inputs"]["raw"] for x in (documents, neighbors)}
  if len(read | ({stages.require(workdir, "raw")["id"]} if has_raw else set())) > 1:
    raise UserError(
      f"raw, documents and neighbors of {workdir} have different documents, so nothing is erased: "
      "run `cm3leon encode_documents` and `cm3leon build_neighbors` first."
    )
  bank, first = Bank(workdir / "documents", VocabLayout(**documents["vocab"])), 0
  for split, store in zip(("train", "bank"), bank.parts):
    for shard, count in store.shards.items():
      gone = rows[(first <= rows) & (rows < first + count)]
      if len(gone) and has_raw:
        _erase_raw(workdir / "raw" / shard, split, gone - first)
      if len(gone):
        of_shard = range(first, first + count)
        made = (_blank(bank[i], store.vocab) if i in gone else bank[i] for i in of_shard)
        write_shard(store.folder, shard, made, store.vocab)
      first += count
  (workdir / "documents" / "reconstructions.png").unlink(missing_ok=True)
  config = build(RetrievalConfig, neighbors["retrieval"], "retrieval")
  _erase_embeddings(workdir / "neighbors", rows, config)


def _erase_raw(shard: epath.Path, split: str, numbers: np.ndarray) -> None:
  """Erases the pairs of a shard that have these numbers among those of the split."""
  pairs = reader.read_shard(shard.parent, shard.name, RawPair, split)
  images = {f"images/{epath.Path(str(pairs[i].image)).name}" for i in numbers}
  lines = (shard / "pairs.jsonl").read_text(encoding="utf-8").split("\n")
  for number, line in enumerate(lines):
    pair = json.loads(line) if line else {}
    if pair.get("image") in images:
      kept = {name: pair.get(name, "") for name in ("image", "split", "added_crop")}
      lines[number] = json.dumps({"key": ERASED, "caption": ERASED, **kept})
  digests = (shard / reader.IMAGE_DIGESTS).read_text(encoding="utf-8")
  for image in images:
    black, content = np.zeros_like(reader.load_image(shard / image, None)), io.BytesIO()
    Image.fromarray(black).save(content, "jpeg" if image.endswith(".jpg") else "png")
    with replacing(shard / image) as file:
      file.write(content.getvalue())
    new = str(digest(shard / image))
    digests = re.sub(rf"(?m)^\w+(?=  {re.escape(image)}$)", new, digests)
  for name, text in (("pairs.jsonl", "\n".join(lines)), (reader.IMAGE_DIGESTS, digests)):
    with rewriting(shard / name) as partial:
      partial.write_text(text, encoding="utf-8")


def _blank(document: Document, vocab: VocabLayout) -> Document:
  """Returns a document without key, origin and facts, and with the lengths of `document`."""
  segments = []
  for segment in document.segments:
    first = vocab.text_size if segment.is_image else vocab.num_special
    segments.append(Segment(segment.is_image, np.full_like(segment.tokens, first)))
  return Document("", tuple(segments), "", "", "")


def _erase_embeddings(folder: epath.Path, rows: np.ndarray, config: RetrievalConfig) -> None:
  """Sets the embeddings in `rows` to 0, and builds the blocks of the index with `rows` again.

  While the files of a block are replaced, its searches find less.
  """
  for name in ("documents", "queries", "images"):
    store = ArrayStore(folder / "train" / name)
    for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
      store.write(int(run[0]), np.zeros((len(run), *store.shape[1:])))
  if exists(folder / "index"):
    index = Retriever(folder, config).index
    for block, (start, stop) in enumerate(index.blocks):
      if ((start <= rows) & (rows < stop)).any():
        index.build_block(block)
