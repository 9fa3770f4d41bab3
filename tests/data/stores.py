"""Makes small document stores that several tests read."""

from array_record.python import array_record_module
import numpy as np

from cm3leon_jax.config.data import DataConfig
from cm3leon_jax.data.documents.store import Document, DocumentStore, Segment, write_documents
from cm3leon_jax.data.instructions.samples import Instructions, read_targets, write_targets
from cm3leon_jax.data.rows.plan import RowPlan, RowSource
from cm3leon_jax.vocab import VocabLayout

VOCAB = VocabLayout(num_special=32, text_size=512, image_size=64)
IMAGE_TOKENS = 16


def make_sources(
  folder, num_pairs=50, num_texts=30, text_share=0.3, seed=0, vocab=VOCAB
) -> list[RowSource]:
  """Makes pairs with 4 random candidate neighbors each, and texts of up to 300 tokens."""
  rng = np.random.default_rng(seed)

  def text(n):
    return Segment(False, rng.integers(vocab.num_special, vocab.text_size, n).astype(np.int32))

  def image():
    return Segment(True, vocab.image_ids(rng.integers(0, vocab.image_size, IMAGE_TOKENS)))

  origin = {"source": "test", "license": "CC0-1.0", "attribution": "nobody"}
  pairs = (
    Document(f"p{i}", (text(rng.integers(2, 9)), image()), group=f"g{i}", **origin)
    for i in range(num_pairs)
  )
  texts = (Document(f"t{i}", (text(rng.integers(2, 300)),), **origin) for i in range(num_texts))
  write_documents(folder / "pairs", pairs, vocab)
  write_documents(folder / "texts", texts, vocab)
  store = DocumentStore(folder / "pairs", vocab)
  neighbors = np.stack([rng.permutation(num_pairs)[:4] for _ in range(num_pairs)]).astype(np.int32)
  neighbors[::7, 2:] = -1
  return [
    RowSource(store, 1 - text_share, neighbors, store),
    RowSource(DocumentStore(folder / "texts", vocab), text_share),
  ]


def make_instructions(folder, count=30, seed=0) -> list[RowSource]:
  """Makes two tasks with equal shares: answers inside a text, and edits of an image."""
  rng = np.random.default_rng(seed)

  def text(n):
    return Segment(False, rng.integers(VOCAB.num_special, VOCAB.text_size, n).astype(np.int32))

  def image():
    return Segment(True, VOCAB.image_ids(rng.integers(0, VOCAB.image_size, IMAGE_TOKENS)))

  made: dict = {"answers": [], "edits": []}
  for _ in range(count):
    size = int(rng.integers(1, 4))
    made["answers"].append(((text(6 + size), image()), (5, 5 + size)))
    segments = (text(2), image(), text(3), image())
    made["edits"].append((segments, (9 + IMAGE_TOKENS, 9 + 2 * IMAGE_TOKENS)))
  sources = []
  for name, found in made.items():
    documents = (Document(f"{name}{i}", s, "", "", "") for i, (s, _) in enumerate(found))
    write_documents(folder / name, documents, VOCAB)
    write_targets(folder / name, [target for _, target in found])
    instructions = Instructions(read_targets(folder / name, count))
    store = DocumentStore(folder / name, VOCAB)
    sources.append(RowSource(store, 0.5, instructions=instructions, name=name))
  return sources


def damage_record(path, record: int) -> None:
  """Flips one bit of a shard so that exactly the record `record` becomes unreadable."""
  whole = path.read_bytes()

  def unreadable(i: int) -> bool:
    try:
      array_record_module.ArrayRecordReader(str(path)).read([i])
    except (ValueError, IndexError, RuntimeError):
      return True
    return False

  count = array_record_module.ArrayRecordReader(str(path)).num_records()
  for position in [i for i, byte in enumerate(whole) if byte][::15]:
    path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
    if unreadable(record) and not any(unreadable(i) for i in range(count) if i != record):
      return
  raise AssertionError(f"no bit of {path} damages only record {record}")


def make_plan(sources, seed=0, **fields) -> RowPlan:
  config = DataConfig(**{"sequence_length": 128, "pack_window": 64, **fields})
  return RowPlan(sources, config, VOCAB, seed)
