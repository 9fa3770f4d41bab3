"""Runs the commands of docs/weights.md, "From Anole's weights to your pictures", on a tiny folder.

  PYTHONPATH=$PWD python .ci/weights.py

The folder is a random Chameleon in the published layout. Commands with a config get the flags of
its sizes. The last command must write a folder that `transformers` loads without a missing key.
"""

import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image

from tests.clip import huggingface_files
from tests.importing import published_chameleon

TITLE = "\n## From Anole's weights to your pictures\n"
SIZES = {
  "vocab.text_size": published_chameleon.ROWS - published_chameleon.CODES,
  "vocab.image_size": published_chameleon.CODES,
  "vocab.num_special": 16,
  **{f"model.{name}": x for name, x in published_chameleon.MODEL.items() if name != "vocab_size"},
  "model.max_positions": 256,
  "data.sequence_length": 128,
  "raw.resolution": published_chameleon.SIDE,
  "vqgan.resolution": published_chameleon.SIDE,
  **{"vqgan.downsample": 2, "vqgan.stem": 2, "vqgan.multipliers": (1,)},
  **{"vqgan.encoder_blocks": (1,), "vqgan.decoder_blocks": (1,)},
}
RUN = {f"train.{name}": 2 for name in ("steps", "eval_every", "checkpoint_every")}
RUN |= {"train.sample_every": 9}
RUN |= {"evaluation.num_documents": 2, "evaluation.guidance": (3.0,), "train.eval_batches": 1}
RUN |= {"clip.resolution": huggingface_files.SIDE, "clip.patch": 4, "optimizer.warmup_steps": 1}
WORDS = (("red", "blue", "green"), ("house", "lake", "bird", "car"))


def commands(page: str) -> list[list[str]]:
  """Returns the arguments of the commands in the first block of the section."""
  block = page.partition(TITLE)[2].partition("```bash\n")[2].partition("```")[0]
  lines = block.replace("\\\n", " ").splitlines()
  return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("cm3leon ")]


def prepare(folder: pathlib.Path, given: str) -> None:
  """Writes what a user has: the folder of the weights, a CLIP and pictures with captions."""
  published_chameleon.save(folder / given)
  clip = folder / "clip-vit-base-patch32"
  clip.mkdir()
  huggingface_files.write_checkpoint(clip, "quick_gelu", huggingface_files.END)
  images, rng = folder / "my_images", np.random.default_rng(0)
  images.mkdir()
  for i in range(60):
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(images / f"{i}.png")
    caption = f"a {WORDS[0][i % 3]} {WORDS[1][i % 4]} {i}"
    (images / f"{i}.txt").write_text(caption, encoding="utf-8")


def main() -> int:
  steps = commands(pathlib.Path("docs/weights.md").read_text("utf-8"))
  [source] = re.findall(r"--source=(\S+)", " ".join(steps[0]))
  with tempfile.TemporaryDirectory() as root:
    folder = pathlib.Path(root)
    prepare(folder, source)
    for words in steps:
      start, flags = time.monotonic(), [*words]
      if any(word.startswith("--config=") for word in words):
        fields = SIZES | (RUN if words[0] == "run" else {})
        flags += [f"--config.{name}={value}" for name, value in fields.items()]
      if words[0] == "run":  # The random image tokenizer changes colors.
        flags += ["--min_psnr=0", "--max_color_difference=0"]
      subprocess.run([sys.executable, "-m", "cm3leon_jax", *flags], cwd=folder, check=True)
      print(f"weights: {shlex.join(words)}: {time.monotonic() - start:.0f} s", flush=True)
    import transformers

    kind = transformers.ChameleonForConditionalGeneration
    _, keys = kind.from_pretrained(folder / "mine" / "export", output_loading_info=True)
    wrong = [name for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if keys[name]]
    print(f"weights: transformers loads mine/export, {', '.join(wrong) or 'no key differs'}.")
  return int(bool(wrong) or len(steps) != 5)


if __name__ == "__main__":
  sys.exit(main())
