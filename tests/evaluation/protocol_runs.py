"""Makes a tiny run and the files of all evaluation releases, for tests of protocols."""

import copy
import pathlib

from etils import epath
import numpy as np

from cm3leon_jax.data.published.files import open_examples
from tests.data import releases
from tests.data.raw_folder import write_raw
from tests.generation.run import CAPTIONS, save_run


def make_workdir(root: epath.Path, settings) -> epath.Path:
  """Makes a run with random weights and five held-out pairs."""
  root.mkdir(exist_ok=True)
  save_run(root, settings)
  rng = np.random.default_rng(3)
  images = [rng.integers(0, 256, (8, 8, 3), np.uint8) for _ in CAPTIONS]
  pairs = [
    {"key": f"h{i}", "caption": caption, "split": "heldout", "concept": caption.split()[1]}
    for i, caption in enumerate(CAPTIONS)
  ]
  write_raw(root / "raw", pairs, images)
  return root


def make_data(root: pathlib.Path) -> pathlib.Path:
  """Writes the files and images of all evaluation releases, with ten answers to each question."""
  for name, release in releases.RELEASES.items():
    more = {"test_split.json": [31, 32]} if name == "vg_paragraphs" else {}
    releases.write(root, more_answers(copy.deepcopy(release)) | more)
    split = {"coco_karpathy": "test", "vg_paragraphs": "test"}.get(name, "val")
    paths = {pathlib.Path(example.image) for example in open_examples(name, root, split)}
    releases.write_images(paths)
  return root


def more_answers(value):
  """Extends the answers to a question to ten, as in the released files."""
  if isinstance(value, dict):
    return {
      k: (v * 10)[:10] if k == "answers" and is_answers(v) else more_answers(v)
      for k, v in value.items()
    }
  return [more_answers(v) for v in value] if isinstance(value, list) else value


def is_answers(value) -> bool:
  return isinstance(value[0], dict)
