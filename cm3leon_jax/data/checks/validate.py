"""Compares all files of raw folders and document stores with their digests."""

from concurrent import futures

from etils import epath

from cm3leon_jax.data.documents.store import INDEX, DocumentStore
from cm3leon_jax.data.raw import reader as raw_pairs
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.digests import digest
from cm3leon_jax.vocab import VocabLayout


def validate_stores(folder: epath.PathLike, vocab: VocabLayout) -> None:
  """Opens all stores in a folder, compares their shards with the digests, and prints their sizes.

  Raises:
    UserError: a store is damaged. The message names the file.
  """
  for index in sorted(epath.Path(folder).glob(f"*/{INDEX}")):
    store = DocumentStore(index.parent, vocab)
    for name in store.shards:
      store.check_shard(name)
    print(f"{store.folder}: {len(store):,} documents; all shards match their digests.", flush=True)


def validate_raw(folder: epath.PathLike, num_threads: int) -> None:
  """Compares all files of a raw folder with their digests and prints the number of images.

  Raises:
    UserError: a file is missing, or it changed after it was written. The message names the file.
  """
  folder = epath.Path(folder)
  names, images = list(raw_pairs.shards(folder)), 0
  for name in names:
    for file, expected in raw_pairs.described_files(folder, name).items():
      raw_pairs.check_file(folder / name, file, expected)
    images += _validate_images(folder / name, num_threads)
  print(f"{folder}: {len(names):,} shards, {images:,} images; all match their digests.", flush=True)


def _validate_images(shard: epath.Path, num_threads: int) -> int:
  """Compares the images of a raw shard with their digests. Returns the number of images."""
  lines = (shard / raw_pairs.IMAGE_DIGESTS).read_text(encoding="utf-8").splitlines()
  expected = {name: sha256 for sha256, name in (line.split("  ", 1) for line in lines)}
  with futures.ThreadPoolExecutor(num_threads) as pool:
    for name, result in zip(expected, pool.map(lambda name: digest(shard / name), expected)):
      if result != expected[name]:
        wrong = "changed after it was written" if result else "is missing"
        raise UserError(f"{shard / name} {wrong}: {raw_pairs.again(shard)}.")
  return len(expected)
