"""Makes the workdir that stages before training would leave, from random arrays."""

import json
import pathlib

from cm3leon_jax.config.settings import Settings
from cm3leon_jax.config.tokenizers import TextTokenizerConfig
from cm3leon_jax.stages import stages
from cm3leon_jax.tokenizers import vqgan
from cm3leon_jax.tokenizers.text import train_text_tokenizer
from tests.data.stores import make_instructions, make_sources
from tests.generation.run import vqgan_params
from tests.retrieval.stores import write_neighbors

PAIRS = 50


def make_workdir(root: pathlib.Path, settings: Settings) -> None:
  """Writes stores with the same 50 pairs and 30 texts in both splits, and a random VQGAN.

  If the config has instructions, their tasks must be those of `make_instructions`.
  """
  sources = make_sources(root / "made", num_pairs=PAIRS, vocab=settings.vocab)
  for kind in ("pairs", "texts"):
    for split in ("train", "heldout"):
      (root / "documents").mkdir(exist_ok=True)
      (root / "documents" / f"{split}_{kind}").symlink_to(root / "made" / kind)
  for split in ("train", "heldout"):
    ids = sources[0].neighbors
    write_neighbors(root / "neighbors" / f"{split}_pairs", ids=ids, text_ids=ids)
  # Has enough different words to train the text tokenizer.
  words = [f"word{i} word{i + 1}" for i in range(400)]
  train_text_tokenizer(words, settings.vocab, TextTokenizerConfig(), root / "text_tokenizer")
  image_tokenizer = settings.vqgan, settings.vocab.image_size
  vqgan.ImageTokenizer(*image_tokenizer, vqgan_params(settings)).save(root / "vqgan")
  finished = {"config": {}, "summary": {}, "seconds": 0.0}
  if settings.instructions.any:
    for i, split in enumerate(("train", "heldout")):
      for source in make_instructions(root / "made_instructions" / split, seed=i):
        (root / "instructions").mkdir(exist_ok=True)
        store = root / "instructions" / f"{split}_{source.name}"
        store.symlink_to(root / "made_instructions" / split / source.name)
    (root / "instructions" / stages.DONE).write_text(json.dumps({**finished, "id": "i"}))
  for name in ("documents", "neighbors"):
    (root / name / stages.DONE).write_text(json.dumps({**finished, "id": name}))
