"""Measures the peak memory of an evaluation with a protocol, for different numbers of images.

  python -m benchmarks.protocol_memory --config=ml_configs/scenes.py --workdir=workdir/scenes

Writes random images with captions in the format of COCO to a temporary folder. For each number of
images, runs `launch.evaluate --protocol` on a copy of the run, in a separate process.
"""

import json
import os
import subprocess
import sys
import tempfile

from absl import flags
from etils import epath
import numpy as np
from PIL import Image

from cm3leon_jax.commands import common

_COUNTS = flags.DEFINE_list("counts", ["500", "2000"], "Numbers of images.")
WORDS = ("red", "blue", "green", "star", "key", "bell", "fish", "two", "three", "left")
PROTOCOL = """
title: memory
task: image
data: {format: coco_2014, split: val, count: 0}
columns: [{name: plain}]
metrics: [frechet_distance, clip_score]
extractor: clip
"""


def write_images(folder: epath.Path, count: int, side: int) -> None:
  """Writes `count` images of random pixels, each with a caption of three words."""
  rng = np.random.default_rng(0)
  content: dict[str, list] = {"images": [], "annotations": []}
  (folder / "val2014").mkdir(parents=True)
  for i in range(count):
    pixels = rng.integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "val2014" / f"{i}.png")
    content["images"].append({"id": i, "file_name": f"{i}.png"})
    caption = " ".join(rng.choice(WORDS, 3))
    content["annotations"].append({"image_id": i, "id": i, "caption": caption})
  (folder / "captions_val2014.json").write_text(json.dumps(content))


def peak_of(command: list[str]) -> float:
  """Runs a command; returns the peak memory of the process in GiB."""
  child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
  _, status, usage = os.wait4(child.pid, 0)
  child.returncode = os.waitstatus_to_exitcode(status)
  if child.returncode:
    raise subprocess.CalledProcessError(child.returncode, command)
  return usage.ru_maxrss / 2**20


def main(settings, workdir: epath.Path) -> None:
  counts = [int(count) for count in _COUNTS.value]
  flag = next(argument for argument in sys.argv if argument.startswith("--config"))
  with tempfile.TemporaryDirectory() as name:
    folder = epath.Path(name)
    write_images(folder / "data", max(counts), settings.vqgan.resolution)
    (folder / "memory.yaml").write_text(PROTOCOL)
    (folder / "run").mkdir()
    for path in workdir.iterdir():  # Folders are links, so the run stays unchanged.
      if path.name != "evaluations":
        os.symlink(os.path.realpath(path), folder / "run" / path.name)
    for count in counts:
      command = [sys.executable, "-m", "launch.evaluate", flag, f"--workdir={folder / 'run'}"]
      command += [f"--protocol={folder / 'memory.yaml'}", f"--data={folder / 'data'}"]
      peak = peak_of([*command, f"--examples={count}"])
      print(f"{count} images: peak of {peak:.2f} GiB", flush=True)


if __name__ == "__main__":
  common.run(main)
