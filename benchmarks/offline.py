"""Measures how many records the offline stages ingest, encode and embed per second on one machine.

  python -m benchmarks.offline

Images are OpenMoji drawings (the extra `demo`), 320 pixels wide, as JPEG in a WebDataset tar.
Models have their real sizes and random weights.
"""

import io
import json
import tarfile
import tempfile
import time

from absl import app, flags
from etils import epath
import jax
import numpy as np
from PIL import Image

from cm3leon_jax.clip import checkpoint
from cm3leon_jax.clip import huggingface as hf_clip
from cm3leon_jax.configs import cm3leon_7b
from cm3leon_jax.data.raw import ingest, reader
from cm3leon_jax.data.raw.config import RawConfig
from cm3leon_jax.files.shards import Runner
from cm3leon_jax.settings import settings_from_config
from cm3leon_jax.tokenizers import vqgan
from cm3leon_jax.tokenizers.config import TextTokenizerConfig
from cm3leon_jax.tokenizers.text import TextTokenizer, train_text_tokenizer
from cm3leon_jax.vocab import VocabLayout
from examples.openmoji import drawings as openmoji

_RECORDS = flags.DEFINE_integer("records", 1_000, "Records in the tar.")
_REPEATS = flags.DEFINE_integer(
  "repeats", 5, "Repetitions; their median, smallest and largest are printed."
)
_THREADS = flags.DEFINE_integer("threads", 2, "Threads that read and scale images.")

VIT_B32 = checkpoint.HFCLIPConfig(
  checkpoint.EncoderSizes(512, 12, 8, 2_048, "quick_gelu", 1e-5),
  checkpoint.EncoderSizes(768, 12, 12, 3_072, "quick_gelu", 1e-5),
  512, 49_408, 77, 49_407, 224, 32,
)  # fmt: skip


def report(what: str, count: int, run, unit: str) -> None:
  """Prints the median and range of items per second; a call of `run()` processes `count` items."""
  run()
  rates = []
  for _ in range(_REPEATS.value):
    start = time.perf_counter()
    run()
    rates.append(count / (time.perf_counter() - start))
  print(
    f"{what}: {np.median(rates):,.1f} ({min(rates):,.1f} to {max(rates):,.1f}) {unit}/s", flush=True
  )


def write_tar(path: epath.Path, count: int) -> None:
  """Writes a shard in the format of img2dataset."""
  with tarfile.open(str(path), "w") as tar:
    for i, drawing in enumerate(openmoji.drawings()[0][:count]):
      buffer = io.BytesIO()
      Image.fromarray(openmoji.render(drawing.path, 320)).save(buffer, "jpeg", quality=90)
      about = {"url": drawing.code, "license": openmoji.LICENSE, "caption": drawing.caption}
      members = {
        "jpg": buffer.getvalue(),
        "txt": drawing.caption.encode(),
        "json": json.dumps(about).encode(),
      }
      for suffix, data in members.items():
        info = tarfile.TarInfo(f"{i:09d}.{suffix}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def ingestion(folder: epath.Path) -> list:
  """Measures ingestion of a tar into a raw shard of 256-pixel images; returns the pairs."""
  config = RawConfig(source=str(folder / "in"), resolution=256, num_threads=_THREADS.value)
  (folder / "in").mkdir()
  write_tar(folder / "in" / "00000.tar", _RECORDS.value)
  parts = ingest.parts_of(config)

  def run():
    if (folder / "raw").exists():
      (folder / "raw").rmtree()
    ingest.prepare(config, parts, folder / "raw", Runner())

  report(f"ingestion, {_THREADS.value} threads", _RECORDS.value, run, "images")
  return [
    pair for split in ("train", "heldout") for pair in reader.read_pairs(folder / "raw", split)
  ]


def encoding(folder: epath.Path, pairs: list) -> None:
  """Measures encoding of images with the VQGAN of the 7B config, and of captions to token ids."""
  settings = settings_from_config(cm3leon_7b.get_config())
  paths = [pair.image for pair in pairs]

  def load(paths: list[str]) -> np.ndarray:
    return reader.load_images(paths, 256, _THREADS.value)

  report(f"reading 256 pixels, {_THREADS.value} threads", len(paths), lambda: load(paths), "images")
  images = load(paths[:8])
  params = vqgan.init_params(settings.vqgan, settings.vocab.image_size, jax.random.key(0))
  tokenizer = vqgan.ImageTokenizer(settings.vqgan, settings.vocab.image_size, params, batch_size=8)
  report(
    "VQGAN, 256 pixels, 256 codes, float32", len(images), lambda: tokenizer.encode(images), "images"
  )
  captions = [pair.caption for pair in pairs]
  small = VocabLayout(num_special=256, text_size=1_024, image_size=8_192)
  train_text_tokenizer(captions * 20, small, TextTokenizerConfig(), folder / "text")
  text = TextTokenizer(folder / "text", small)
  report("captions to ids", len(captions), lambda: text.encode_batch(captions), "captions")


def embedding() -> None:
  """Measures embedding of images and captions with a CLIP ViT-B/32 in bfloat16."""
  rng = np.random.default_rng(0)

  def normal(shape) -> np.ndarray:
    return (0.02 * rng.standard_normal(shape)).astype(np.float32)

  tensors = {name: normal(shape) for name, shape in checkpoint.tensor_shapes(VIT_B32).items()}
  params = checkpoint.stack_layers(tensors, VIT_B32, jax.numpy.bfloat16)
  pixels, tokens = normal((32, 3, 224, 224)), np.full((32, 77), 49_407, np.int32)
  for what, embed, inputs in (
    ("images", hf_clip.embed_pixels, pixels),
    ("captions", hf_clip.embed_tokens, tokens),
  ):

    def run(embed=embed, inputs=inputs) -> None:
      jax.block_until_ready(embed(VIT_B32, params, inputs))

    report(f"CLIP ViT-B/32, bfloat16, {what}", len(inputs), run, what)


def main(_):
  with tempfile.TemporaryDirectory() as temporary:
    folder = epath.Path(temporary)
    encoding(folder, ingestion(folder))
  embedding()


if __name__ == "__main__":
  app.run(main)
