"""Writes a trained tokenizer as a folder of the package, in float16, with its attribution.

python -m examples.pictures.ship workdir/pictures/vqgan pictures_data FOLDER
"""

import pathlib
import shutil
import sys

import jax
import numpy as np

from cm3leon_jax.tokenizers import vqgan
from cm3leon_jax.weights import stored_tensors


def main(trained: str, data: str, folder: str) -> None:
  tokenizer, target = vqgan.ImageTokenizer.load(trained), pathlib.Path(folder)
  target.mkdir(parents=True, exist_ok=True)
  rounded = jax.tree.map(lambda x: np.asarray(x).astype(np.float16), tokenizer.params)
  stored_tensors.save(target / vqgan.PARAMS, rounded)
  for source in (pathlib.Path(trained, vqgan.CONFIG), pathlib.Path(data, "ATTRIBUTION.md")):
    shutil.copy(source, target)


if __name__ == "__main__":
  main(*sys.argv[1:])
