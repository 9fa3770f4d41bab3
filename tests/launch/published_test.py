"""Runs the config published_350m from two folders of published models to an image.

The folders have the layouts of the published files, but few channels and random weights: no file
of a published model is part of this project.
"""

import json
import os
import subprocess
import sys

import numpy as np
from PIL import Image, ImageOps
import pytest

from cm3leon_jax.data.documents.store import DocumentStore
from cm3leon_jax.data.raw import reader
from cm3leon_jax.files.json_files import read_json_lines
from cm3leon_jax.retrieval.bank import Embeddings
from cm3leon_jax.run.source import settings_of_run
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from tests.clip.huggingface_files import END, write_checkpoint
from tests.launched import ROOT
from tests.tokenizers.published_random import save_random

CAPTIONS = ("a red house by a lake", "a blue boat on the sea", "a green tree in the snow")
GIVEN = {"raw.source": "images", "retrieval.clip": "clip"}
# Makes training and evaluation fast. The tokenizers, CLIP and the image size stay as they are.
SMALLER = {"vocab.text_size": 512, "raw.crops": 3, "data.num_neighbors": 1}
SMALLER |= {"data.sequence_length": 640, "data.pack_window": 16, "optimizer.warmup_steps": 1}
SMALLER |= {"model.num_layers": 1, "model.width": 64, "model.num_heads": 2, "model.mlp_width": 128}
SMALLER |= {"train.steps": 2, "train.global_batch_size": 2, "train.rows_per_device": 1}
SMALLER |= {"train.eval_batches": 1, "evaluation.batch_size": 1, "evaluation.num_resamples": 100}
FLAGS = [f"--config.{name}={value}" for name, value in (GIVEN | SMALLER).items()]
STAGES = [
  "prepare_data", "train_text_tokenizer", "train_vqgan", "encode_documents", "build_neighbors",
  "train", "generate", "evaluate", "export", "report",
]  # fmt: skip


def draw(seed: int) -> Image.Image:
  """Draws an image of 320 x 256 pixels with soft areas of color."""
  coarse = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), np.uint8)
  return Image.fromarray(coarse).resize((320, 256), Image.Resampling.BICUBIC)


def write_images(folder) -> None:
  """Writes three pictures. Two are trained on; the third and its mirror image are held out.

  A run needs a training pair whose tokens fill a batch (here with three crops per image), and two
  held-out concepts, because the evaluation computes confidence intervals.
  """
  folder.mkdir()
  pictures = [draw(i) for i in range(3)]
  pictures.append(ImageOps.mirror(pictures[2]))
  for i, picture in enumerate(pictures):
    picture.save(folder / f"{i}.png")
    about = {"caption": CAPTIONS[min(i, 2)], "split": "train" if i < 2 else "heldout"}
    (folder / f"{i}.json").write_text(json.dumps(about))


def cm3leon(folder, *flags) -> str:
  """Runs a command in `folder`, on one device as on a user's machine; returns its output."""
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  done = subprocess.run(
    [sys.executable, "-m", "cm3leon_jax", *flags],
    cwd=folder, env={**environment, "PYTHONPATH": str(ROOT)}, timeout=3_000, text=True,
    check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout
  return done.stdout


@pytest.mark.slow
def test_published_folders_become_a_model_that_draws_256_pixels(tmp_path):
  diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
  tokenizer, clip = tmp_path / "amused", tmp_path / "clip"
  tokenizer.mkdir()
  clip.mkdir()
  save_random(tokenizer, 8_192)
  clip_model = write_checkpoint(clip, "quick_gelu", END)
  write_images(tmp_path / "images")
  of_run = ["--config=published_350m", "--workdir=run", *FLAGS]
  imported = cm3leon(tmp_path, "import_vqgan", *of_run, "--source=amused")
  assert "256x256 pixels are 16x16 = 256 of 8,192 codes" in imported
  printed = cm3leon(tmp_path, "run", *of_run)
  lines = [line for line in printed.splitlines() if line.startswith("[")]
  assert [line.partition("] ")[2].partition(":")[0] for line in lines] == STAGES
  run = tmp_path / "run"
  assert "nothing is trained" in (run / "logs" / "train_vqgan.log").read_text()
  assert not (run / "clip").exists()
  results = read_json_lines(run / "samples" / "results.jsonl")
  assert results
  for line in results:
    with Image.open(run / "samples" / line["file"]) as image:
      assert image.size == (256, 256)
  model = diffusers.VQModel.from_pretrained(tokenizer).eval()
  with torch.no_grad():
    check_codes(run, model, torch)
    check_embeddings(run, clip_model, torch)


def check_codes(run, model, torch) -> None:
  """Compares the codes of the run's documents, and their images, with those of diffusers."""
  vocab = settings_of_run(run).vocab
  store = DocumentStore(run / "documents" / "heldout_pairs", vocab)
  images = np.stack(reader.open_images(run / "raw", "heldout", 256)[np.arange(2)])
  codes = np.stack([vocab.image_codes(store[i].segments[1].tokens) for i in range(2)])
  pixels = torch.tensor(images).permute(0, 3, 1, 2) / 255
  expected = model.quantize(model.encode(pixels).latents)[2][2].reshape(2, 256).numpy()
  assert len(np.unique(expected)) > 5
  assert (codes == expected).mean() > 0.99
  shape = (2, 16, 16, model.config.vq_embed_dim)
  decoded = model.decode(torch.tensor(codes), force_not_quantize=True, shape=shape).sample
  expected = np.clip(decoded.permute(0, 2, 3, 1).numpy() * 255, 0, 255)
  found = ImageTokenizer.load(run / "vqgan").decode(codes)
  assert found.std() > 5
  # A stored pixel is rounded to an integer, and differs from diffusers' by the rounding only.
  assert np.abs(found - expected).max() < 0.55


def check_embeddings(run, model, torch) -> None:
  """Compares the run's embeddings of images, in bfloat16, with those of transformers."""
  import transformers

  images = np.stack(reader.open_images(run / "raw", "heldout", 256)[np.arange(2)])
  processor = transformers.CLIPImageProcessorPil.from_pretrained(run.parent / "clip")
  pixels = processor(list(images), return_tensors="pt", input_data_format="channels_last")
  found = model.get_image_features(**pixels)
  expected = torch.nn.functional.normalize(getattr(found, "pooler_output", found), dim=-1).numpy()
  rows = np.asarray(Embeddings(run / "neighbors" / "heldout").images[:], np.float32)
  cosines = rows @ expected.T
  assert np.diag(cosines).min() > 0.99
  assert cosines[0, 1] < np.diag(cosines).min()
