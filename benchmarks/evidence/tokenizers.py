"""Compares PSNR, perplexity and bits of image tokenizer quantizers after equal training time.

  python -m benchmarks.evidence.tokenizers --workdir=workdir/tokenizers

Trains an image tokenizer with each quantizer and seed, encodes the images, and trains a small
decoder of the same size on the codes of each tokenizer. Prepares the shared data only once. Writes
results.json and table.md after every run. Finished parts are skipped and a training continues from
its last checkpoint, so the command can be stopped or killed at any time. docs/vqgan.md describes
the method.
"""

from collections.abc import Callable
import dataclasses
import functools
import pathlib
import sys
import time

from absl import app, flags, logging
from etils import epath
import jax
import numpy as np

from benchmarks.evidence import experiment as experiment_lib
from benchmarks.evidence import tokenizers_table as table
from cm3leon_jax.config import UserError
from cm3leon_jax.config.settings import Settings, settings_from_config
from cm3leon_jax.config.tokenizers import levels_of
from cm3leon_jax.data.documents.store import DocumentStore
from cm3leon_jax.data.raw import reader
from cm3leon_jax.data.rows import loader
from cm3leon_jax.evaluation.likelihood import bits
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.mesh import create_mesh, shard
from cm3leon_jax.run import stages
from cm3leon_jax.run import table as stage_table
from cm3leon_jax.training.image_models import vqgan_training
from cm3leon_jax.training.step.optimizer import create_optimizer
from cm3leon_jax.training.step.state import init_state, train_step
from cm3leon_jax.weights import reading
from examples.scenes import config as scenes

ARMS = {
  "restarts": "nearest code, dead codes restart",
  "fsq": "FSQ",
}
# Fields of `OLDER` that are replaced by the values of the demo's config, variant `long`, because
# these trainings are ten times as long.
TUNED = ("learning_rate", "l1_weight")
LONGER = {f"vqgan.{name}": scenes.get_config("long").vqgan[name] for name in TUNED}
SHARED = ("raw", "text_tokenizer", "clip", "neighbors")  # Stages that all runs share.
CORES = 2  # A minute of training means 60 seconds of CPU time on each core.
ROUNDS, STEPS = 7, 6  # Number of timing rounds, and of steps per arm and round.
SCORED = 400  # Maximum number of held-out images for `bits_per_pixel`.


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Location and size of the comparison.

  Attributes:
    workdir: folder that contains all comparisons.
    codes: size of the codebook; with 0, the size in the config.
    minutes: training time of each image tokenizer in minutes.
    decoder_minutes: training time of each decoder in minutes; with 0, no decoder is trained.
    given: config field -> value, for the fields that the user sets.
  """

  workdir: pathlib.Path
  codes: int
  minutes: float
  decoder_minutes: float
  given: dict

  @property
  def shared(self) -> pathlib.Path:
    """Workdir of the stages whose results all runs share."""
    return self.workdir / f"scenes_{self._config().vocab.image_size}" / "shared"

  @property
  def shared_stages(self) -> tuple[str, ...]:
    """Stages that run only once for all runs, in the order in which they run."""
    return SHARED if self.decoder_minutes else stage_table.STAGES["vqgan"].reads

  @property
  def folder(self) -> pathlib.Path:
    """Folder that contains the runs with these training times."""
    return self.shared.parent / f"minutes_{self.minutes:g}_{self.decoder_minutes:g}"

  def _config(self):
    config = scenes.get_config()
    if self.codes:
      config.vocab.image_size = self.codes
    config.update_from_flattened_dict(self.given)
    return config

  def overrides(self, arm: str = "", seed: int = 0, steps: dict | None = None) -> dict:
    """Returns the config fields that differ from the demo's config.

    Args:
      arm: quantizer, a key of `ARMS`; empty for the shared stages.
      seed: seed of the run.
      steps: stage -> number of training steps.
    """
    vocab, never = self._config().vocab, 1_000_000
    fields = {
      "vocab.image_size": vocab.image_size,
      "model.vocab_size": vocab.text_size + vocab.image_size,
      "data.num_neighbors": 0,
      "data.text_share": 0.0,
      "train.eval_every": never,
      "train.sample_every": never,
      "train.checkpoint_every": 100,
      **experiment_lib.OLDER,
      **LONGER,
      **self.given,
      "seed": seed,
    }
    if arm == "fsq":
      fields["vqgan.quantizer"] = arm
      fields["vqgan.code_dim"] = max(1, len(levels_of(vocab.image_size)))
    return fields | {f"{stage}.steps": count for stage, count in (steps or {}).items()}

  def settings(self, overrides: dict) -> Settings:
    """Returns the validated settings."""
    config = scenes.get_config()
    config.update_from_flattened_dict(overrides)
    return settings_from_config(config)

  def command(self, name: str, workdir: pathlib.Path, overrides: dict) -> None:
    """Runs a stage with `experiment.run_stage`."""
    experiment_lib.run_stage(name, "examples/scenes/config.py", workdir, overrides)


def tokenizer_steps(settings: Settings) -> Callable[[int], None]:
  """Returns a function that runs a number of training steps of the image tokenizer."""
  config = settings.vqgan
  shape = (config.batch_size, config.resolution, config.resolution, 3)
  images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
  state = vqgan_training.init_state(config, settings.vocab.image_size, 0)

  def take(count: int) -> None:
    nonlocal state
    for _ in range(count):
      state, _ = vqgan_training.train_step(state, images, config, config.adversarial_weight > 0)
    jax.block_until_ready(state)

  return take


def decoder_steps(settings: Settings) -> Callable[[int], None]:
  """Returns a function that runs a number of training steps of the decoder."""
  model, vocab, length = settings.model, settings.vocab, settings.data.sequence_length
  optimizer = create_optimizer(settings.optimizer, settings.train.steps)
  rng, rows = np.random.default_rng(0), settings.train.global_batch_size
  samples = [
    rng.integers(vocab.num_special, vocab.size, length + 1).astype(np.int32) for _ in range(rows)
  ]
  arrays = loader.rows_of_samples(samples, length, vocab, model.align_images)
  batch = {name: shard(array, "batch", "length") for name, array in arrays.items()}
  decay = settings.optimizer.ema_decay
  step = jax.jit(
    functools.partial(train_step, model, optimizer, vocab.text_size, 1, ema_decay=decay),
    donate_argnums=0,
  )
  state = jax.jit(functools.partial(init_state, model, optimizer, averaged=decay > 0))(
    jax.random.key(0)
  )

  def take(count: int) -> None:
    nonlocal state
    for _ in range(count):
      state, _ = step(state, batch)
    jax.block_until_ready(state)

  return take


def cpu_seconds(runners: dict[str, Callable[[int], None]], rounds: int, steps: int) -> dict:
  """Measures the median CPU seconds per step of each runner; the runners alternate.

  CPU time is measured because other work on the machine increases wall-clock time.
  """
  for take in runners.values():
    take(2)  # The first call compiles.
  found: dict[str, list[float]] = {name: [] for name in runners}
  for _ in range(rounds):
    for name, take in runners.items():
      start = time.process_time()
      take(steps)
      found[name].append((time.process_time() - start) / steps)
  return {name: float(np.median(values)) for name, values in found.items()}


def plan_steps(experiment: Experiment) -> dict:
  """Measures how many steps take the given minutes, or reads the numbers from steps.json.

  Returns:
    `cpu_seconds` per step and number of `steps`, each with a value per arm, and one for "decoder",
    which all arms share.
  """
  path = experiment.folder / "steps.json"
  if path.exists():
    return read_json(path, {"cpu_seconds": dict, "steps": dict})
  print("tokenizers: measures the CPU time of a step of every arm.", flush=True)
  settings = {arm: experiment.settings(experiment.overrides(arm)) for arm in ARMS}
  with jax.set_mesh(create_mesh(settings["restarts"].mesh)):
    runners = {arm: tokenizer_steps(settings[arm]) for arm in ARMS}
    seconds = cpu_seconds(runners, ROUNDS, STEPS)
    del runners
    if experiment.decoder_minutes:
      seconds |= cpu_seconds({"decoder": decoder_steps(settings["restarts"])}, ROUNDS, STEPS)
  minutes = dict.fromkeys(ARMS, experiment.minutes) | {"decoder": experiment.decoder_minutes}
  steps = {name: max(10, round(60 * CORES * minutes[name] / one)) for name, one in seconds.items()}
  plan = {"cpu_seconds": seconds, "steps": steps, "cores": CORES}
  write_json(path, plan)
  return plan


def bits_per_pixel(settings: Settings, run: pathlib.Path) -> float:
  """Computes the bits per pixel of held-out images' codes, given their captions."""
  store = DocumentStore(run / "documents" / "heldout_pairs", settings.vocab)
  rows = np.unique(np.linspace(0, len(store) - 1, SCORED).astype(int))
  documents = [store[int(i)] for i in rows]
  samples = [loader.join([document], settings.vocab) for document in documents]
  masks = [bits.own_targets(s, d, settings.vocab)["image"] for s, d in zip(samples, documents)]
  with jax.set_mesh(create_mesh(settings.mesh)):
    params, _ = reading.load_params(run / "train", settings.model)
    size = settings.evaluation.batch_size
    scored = bits.score_samples(params, settings.model, samples, settings.vocab, size)
  total = sum(float(values[mask].sum()) for values, mask in zip(scored, masks))
  return total / (len(samples) * settings.vqgan.resolution**2)


def heldout_images(experiment: Experiment, settings: Settings) -> np.ndarray:
  """Returns the held-out images, which all runs share: uint8 [n, H, W, 3]."""
  raw, resolution = epath.Path(experiment.shared) / "raw", settings.vqgan.resolution
  images = reader.open_images(raw, "heldout", resolution)
  return images[np.arange(len(images))]


def commonest_square(images: np.ndarray, side: int) -> float:
  """Computes the share of squares that equal the most common one; a code covers one square.

  Args:
    images: uint8 [n, H, W, 3].
    side: side of a square in pixels.
  """
  n, height, width, _ = images.shape
  squares = images.reshape(n, height // side, side, width // side, side, 3).swapaxes(2, 3)
  _, counts = np.unique(squares.reshape(-1, side * side * 3), axis=0, return_counts=True)
  return float(counts.max() / counts.sum())


def measure(experiment: Experiment, settings: Settings, run: pathlib.Path) -> dict:
  """Measures a run whose tokenizer and decoder are trained."""
  summary = stages.require(run, "vqgan", summary=dict)["summary"]
  names = ("psnr_db", "codebook_perplexity", "codes_used")
  names += tuple(f"train_{name}" for name in names[1:])
  result = {name: summary[name] for name in names}
  result |= {k: v for k, v in summary.items() if k == "reconstructed_images_right"}
  result |= {"codes": settings.vocab.image_size, "steps": settings.vqgan.steps}
  if experiment.decoder_minutes:
    result["bits_per_pixel"] = bits_per_pixel(settings, run)
    result["decoder_steps"] = settings.train.steps
  return result


def run_one(experiment: Experiment, arm: str, seed: int, steps: dict[str, int]) -> dict:
  """Trains and measures one arm with one seed, or reads the results if they exist."""
  run = experiment.folder / "runs" / f"{arm}_seed_{seed}"
  if (run / "measured" / stages.DONE).exists():
    return read_json(run / "measured" / "measured.json", {"arm": str, "seed": int})
  counts = {"vqgan": steps[arm]}
  names = ["vqgan"]
  if experiment.decoder_minutes:
    counts["train"] = steps["decoder"]
    names += ["documents", "train"]
  overrides = experiment.overrides(arm, seed, counts)
  settings = experiment.settings(overrides)
  experiment_lib.link_stages(experiment.shared, run, experiment.shared_stages)
  for name in names:
    experiment.command(stage_table.STAGES[name].command, run, overrides)
  ids = {name: stages.require(run, name)["id"] for name in names}
  with stages.once(run / "measured", {"inputs": ids}) as summary:
    if summary is not None:
      result = {"arm": arm, "seed": seed, **measure(experiment, settings, run)}
      write_json(run / "measured" / "measured.json", result)
  return read_json(run / "measured" / "measured.json", {"arm": str, "seed": int})


def run_all(experiment: Experiment, arms: list[str], num_seeds: int) -> dict:
  """Prepares the data, runs all arms and seeds, and writes the results after each run."""
  # FSQ does not support every number of codes: check all arms before training for hours.
  settings = {arm: experiment.settings(experiment.overrides(arm)) for arm in ARMS}
  for name in experiment.shared_stages:
    command = stage_table.STAGES[name].command
    experiment.command(command, experiment.shared, experiment.overrides())
  plan, runs, result = plan_steps(experiment), [], {}
  vqgan = settings["restarts"].vqgan
  planned = [(seed, arm) for seed in range(num_seeds) for arm in arms]
  about = {
    "source": "scenes",
    "codes": settings["restarts"].vocab.image_size,
    "image_tokens": vqgan.image_tokens,
    "minutes": experiment.minutes,
    "decoder_minutes": experiment.decoder_minutes,
    **plan,
  }
  if vqgan.local_codes:  # Equal squares have equal codes.
    heldout = heldout_images(experiment, settings["restarts"])
    about["commonest_square"] = commonest_square(heldout, vqgan.downsample)
  for number, (seed, arm) in enumerate(planned, 1):
    print(
      f"\n[{number}/{len(planned)}] {ARMS[arm]}, seed {seed}: {plan['steps'][arm]:,} steps",
      flush=True,
    )
    start = time.time()
    runs.append(run_one(experiment, arm, seed, plan["steps"]))
    shown = ", ".join(f"{k} {v:.4g}" for k, v in runs[-1].items() if isinstance(v, float))
    print(f"[{number}/{len(planned)}] {shown}; {time.time() - start:.0f} s.", flush=True)
    result = table.summarize(about, runs, ARMS)
    experiment_lib.write_results(experiment.folder, result, table.markdown(result))
  return result


def main(argv) -> None:
  args = flags.FLAGS
  logging.set_verbosity(logging.WARNING)
  try:
    arms = experiment_lib.chosen_conditions(argv, args.arms, ARMS, "arms")
    decoder = args.minutes if args.decoder_minutes is None else args.decoder_minutes
    workdir = pathlib.Path(args.workdir).resolve()
    experiment = Experiment(workdir, args.codes, args.minutes, decoder, {})
    result = run_all(experiment, arms, args.seeds)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  print(
    f"\n{table.markdown(result)}\ntokenizers: results.json and table.md are in {experiment.folder}."
  )


if __name__ == "__main__":  # Tests import this module without flags.
  flags.DEFINE_string(
    "workdir", "workdir/tokenizers", "Folder of all runs; finished parts are skipped."
  )
  flags.DEFINE_list("arms", list(ARMS), "Quantizers to compare.")
  flags.DEFINE_integer("seeds", 3, "Number of seeds of every arm.", lower_bound=1)
  flags.DEFINE_float("minutes", 4, "Training time of a tokenizer on two cores.", lower_bound=1e-3)
  flags.DEFINE_float(
    "decoder_minutes",
    None,
    "Training time of a decoder on two cores; default: --minutes; 0: no decoder is trained.",
    lower_bound=0,
  )
  flags.DEFINE_integer("codes", 0, "Size of the codebook; 0: the config's size.", lower_bound=0)
  app.run(main)
