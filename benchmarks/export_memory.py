"""Measures the peak memory of launch.export for CM3Leon-7B with only a few layers.

  python -m benchmarks.export_memory
  python -m benchmarks.export_memory --layers=2,4 --formats=hf,orbax --folder=/scratch

For each number of layers, writes a run with a checkpoint of random parameters to a temporary folder
(4 layers need 4 GB, and the export needs another 4 GB). Then `launch.export` exports the run in a
separate process. From the peaks, extrapolates the peak at 32 layers: if the peak does not grow with
the number of layers, it is the same; otherwise, each further layer adds the growth per layer.
"""

from collections.abc import Sequence
import concurrent.futures
import dataclasses
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time

from absl import app, flags, logging
from etils import epath
import jax
import numpy as np

from cm3leon_jax.checkpoints.checkpoint import Checkpoints
from cm3leon_jax.checkpoints.sealing import files_below
from cm3leon_jax.configs import cm3leon_7b
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.mesh import MeshConfig, create_mesh
from cm3leon_jax.models import transformer
from cm3leon_jax.runs import stages, table
from cm3leon_jax.settings import Settings, settings_from_config
from cm3leon_jax.trained import bundles

_LAYERS = flags.DEFINE_list("layers", ["2", "4"], "Numbers of layers, in ascending order.")
_FORMATS = flags.DEFINE_list("formats", ["hf"], "Values of --format.")
_FLAGS = flags.DEFINE_list(
  "export_flags", [], "Additional flags of launch.export, e.g. --dtype=bfloat16."
)
_FOLDER = flags.DEFINE_string("folder", None, "Folder for the temporary files.")
ALL_LAYERS = 32


def settings_of(layers: int) -> Settings:
  """Returns the settings of CM3Leon-7B with `layers` layers."""
  config = cm3leon_7b.get_config()
  config.model.num_layers = layers
  return settings_from_config(config)


def make_run(folder: epath.Path, settings: Settings) -> None:
  """Creates a run with the folders that launch.export reads."""
  for stage in table.TOKENIZERS:
    (folder / stage).mkdir(parents=True)
    for name in bundles.FILES[stage]:
      (bundles.folder_of("scenes") / stage / name).copy(folder / stage / name)
  rng = np.random.default_rng(0)
  with jax.set_mesh(create_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])):
    types = jax.eval_shape(lambda: transformer.init_params(settings.model, jax.random.key(0)))
  # Random values, because zeros would compress to almost nothing.
  params = jax.tree.map(lambda x: rng.random(x.shape, np.float32), types)
  with Checkpoints(folder / "train", keep=2) as checkpoints:
    checkpoints.save({"params": params}, 1, next_row=0)
  stored = {
    "run": table.identity(settings, "train"),
    "settings": dataclasses.asdict(settings),
  }
  write_json(folder / "train" / "config.json", stored)
  for name in (*table.TOKENIZERS, "train"):
    about = {"id": name, "config": {}, "summary": {}, "seconds": 0.0}
    write_json(folder / name / stages.DONE, about)


def export(
  run: epath.Path, output: epath.Path, layers: int, *arguments: str
) -> tuple[float, float]:
  """Runs launch.export; returns the peak memory of its process in GiB, and its time in seconds."""
  command = [sys.executable, "-m", "launch.export", "--config=cm3leon_7b"]
  command += [f"--config.model.num_layers={layers}", f"--workdir={run}", f"--output={output}"]
  command += arguments
  start = time.time()
  child = subprocess.Popen(command)
  _, status, usage = os.wait4(child.pid, 0)
  child.returncode = os.waitstatus_to_exitcode(status)
  if child.returncode:
    raise subprocess.CalledProcessError(child.returncode, command)
  return usage.ru_maxrss / 2**20, time.time() - start


def at_all_layers(peaks: Sequence[tuple[int, float]]) -> float:
  """Extrapolates the peak memory to all layers from pairs (layers, peak), in ascending order.

  at_all_layers([(2, 3.0), (4, 3.1)])  # 0.05 GiB a layer
  4.5
  """
  (few, low), (more, high) = peaks[0], peaks[-1]
  growth = max(high - low, 0) / (more - few) if more > few else 0.0
  return high + growth * (ALL_LAYERS - more)


def main(_) -> None:
  logging.set_verbosity(logging.WARNING)  # Orbax logs every file that it writes.
  peaks: dict[str, list[tuple[int, float]]] = {name: [] for name in _FORMATS.value}
  with tempfile.TemporaryDirectory(dir=_FOLDER.value) as name:
    for layers in map(int, _LAYERS.value):
      run = epath.Path(name) / f"run{layers}"
      # Write the run in a separate process: Linux counts the memory of a parent for its child, too,
      # until the child calls exec.
      with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(make_run, run, settings_of(layers)).result()
      for layout, found in peaks.items():
        output = epath.Path(name) / "export"
        gib, seconds = export(run, output, layers, f"--format={layout}", *_FLAGS.value)
        size = sum((output / name).stat().length for name in files_below(output)) / 1e9
        found.append((layers, gib))
        line = f"{layout}, {layers} layers: peak of {gib:.2f} GiB for {size:.2f} GB"
        print(f"{line}, {seconds:.0f} s", flush=True)
        output.rmtree()
      run.rmtree()
  for layout, found in peaks.items():
    print(f"{layout}, {ALL_LAYERS} layers: {at_all_layers(found):.2f} GiB", flush=True)


if __name__ == "__main__":
  app.run(main)
