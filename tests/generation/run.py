"""Makes a tiny run for generation, with random weights and without raw data."""

import atexit
import contextlib
import dataclasses
import functools
import shutil
import tempfile

from etils import epath
import jax
import numpy as np

from cm3leon_jax.clip import model as clip_lib
from cm3leon_jax.config.settings import default_config, settings_from_config
from cm3leon_jax.config.tokenizers import TextTokenizerConfig
from cm3leon_jax.data.documents.store import Segment, write_documents
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.mesh import MeshConfig, create_mesh
from cm3leon_jax.stages import stages, table
from cm3leon_jax.tokenizers import text, vqgan
from cm3leon_jax.training.step.optimizer import create_optimizer
from cm3leon_jax.training.step.state import TrainState
from cm3leon_jax.weights import checkpoint
from tests.data.stores import VOCAB, make_sources
from tests.models.tiny import random_arrays, random_params, types_of
from tests.retrieval.stores import write_bank, write_neighbors

CAPTIONS = ["red apple", "green apple", "blue car", "old house", "new house"]


def make_config(positions: int = 128):
  config = default_config()
  config.vocab.update(dataclasses.asdict(VOCAB))
  config.vqgan.update(
    {"resolution": 8, "downsample": 2, "stem": 2, "width": 8, "multipliers": (1,)}
  )
  config.vqgan.update(
    {"encoder_blocks": (0,), "decoder_blocks": (0,), "code_dim": 4, "adversarial_weight": 0.0}
  )
  config.clip.update({"resolution": 8, "patch": 4, "image_width": 64, "image_layers": 1})
  config.clip.update({"text_width": 64, "text_layers": 1, "text_length": 8, "embed_dim": 16})
  config.retrieval.update({"backend": "exact"})
  config.data.update({"sequence_length": positions})
  config.model.update(
    {"vocab_size": VOCAB.size, "num_layers": 1, "width": 32, "num_heads": 8, "mlp_width": 32}
  )
  config.model.update({"max_positions": positions, "dtype": "float32"})
  config.sampling.update({"top_k": 8})
  config.train.update({"num_samples": 3})
  return config


SETTINGS = settings_from_config(make_config())


def one_device() -> contextlib.AbstractContextManager:
  return jax.set_mesh(create_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]))


def make_run(root: epath.Path) -> None:
  """Writes tokenizers, five held-out pairs of 8 x 8 pixels, and a bank of twelve documents."""
  # Has enough different words for a vocabulary of 512.
  words = [f"{CAPTIONS[i % 5]} word{i}" for i in range(200)] * 3
  text.train_text_tokenizer(words, VOCAB, TextTokenizerConfig(), root / "text_tokenizer")
  encode = text.TextTokenizer(root / "text_tokenizer", VOCAB).encode
  bank = make_sources(root / "made", num_pairs=12)[0].store
  write_documents(root / "documents" / "train_pairs", [bank[i] for i in range(12)], VOCAB)
  # Makes every text token occur in training.
  every = Segment(False, np.arange(VOCAB.num_special, VOCAB.text_size, dtype=np.int32))
  texts = [dataclasses.replace(bank[0], key="t", segments=(every,))]
  write_documents(root / "documents" / "train_texts", texts, VOCAB)
  heldout = []
  for i, caption in enumerate(CAPTIONS):
    segments = (Segment(False, encode(caption)), bank[i].segments[1])
    fields = {"key": f"h{i}", "segments": segments, "concept": caption.split()[1]}
    heldout.append(dataclasses.replace(bank[i], **fields))
  write_documents(root / "documents" / "heldout_pairs", heldout, VOCAB)
  rng = np.random.default_rng(0)
  vectors = rng.normal(size=(2, 12, 16)).astype(np.float32)
  texts, images = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
  keys = np.array([bank[i].key for i in range(12)])
  write_bank(root / "neighbors" / "train", texts, images, keys, keys)
  ids = np.stack([rng.permutation(12)[:4] for _ in CAPTIONS]).astype(np.int32)
  ids[1, 1:] = -1
  write_neighbors(root / "neighbors" / "heldout_pairs", text_ids=ids)
  of_train = [np.setdiff1d(rng.permutation(12)[:5], i)[:4] for i in range(12)]
  write_neighbors(root / "neighbors" / "train_pairs", ids=np.array(of_train, np.int32))
  image_params = vqgan_params(SETTINGS)
  vqgan.ImageTokenizer(SETTINGS.vqgan, VOCAB.image_size, image_params).save(root / "vqgan")


def vqgan_params(settings) -> dict:
  return random_arrays(types_of(vqgan.init_params, settings.vqgan, settings.vocab.image_size))


def clip_params(settings=SETTINGS) -> dict:
  return random_arrays(types_of(clip_lib.init_params, settings.clip, VOCAB.text_size))


def save_run(root: epath.Path, settings=SETTINGS) -> None:
  """Makes a run that `CM3Leon.load` and all commands can read, with CLIP and checkpoint 7.

  The last parameters are NaN and their average is random: all readers must use the average.
  Runs of equal settings are copies: their files are equal to the byte.
  """
  shutil.copytree(_saved(settings), root, dirs_exist_ok=True)


@functools.cache
def _saved(settings) -> epath.Path:
  root = epath.Path(tempfile.mkdtemp())
  atexit.register(shutil.rmtree, root, ignore_errors=True)
  make_run(root)
  clip_lib.CLIP(settings.clip, VOCAB.text_size, clip_params(settings)).save(root / "clip")
  optimizer = create_optimizer(settings.optimizer, 10)
  with one_device():
    average = random_params(settings.model)
    params = jax.jit(functools.partial(jax.tree.map, lambda x: np.nan * x))(average)
    state = TrainState(np.int32(7), params, jax.jit(optimizer.init)(params), average)
    checkpoints = checkpoint.Checkpoints(root / "train", keep=1)
    checkpoints.save(state, 7, next_row=0)
    checkpoints.close()
  for name in ("text_tokenizer", "vqgan", "documents", "neighbors", "clip", "train"):
    write_json(root / name / stages.DONE, {"id": name, "config": {}, "summary": {}, "seconds": 1.0})
  stored = {"run": table.identity(settings, "train"), "settings": dataclasses.asdict(settings)}
  write_json(root / "train" / "config.json", stored)
  return root
