"""Measures how held-out bits and the share of correct images improve with training FLOPs.

  python -m benchmarks.scaling --workdir=workdir/scaling

Trains decoders of four sizes on `scenes`, with and without retrieved neighbors, with equal tokens
per parameter. Fits power laws, writes their predictions for a fifth size to predictions.json, and
only then trains the fifth size. Writes results.json, table.md and plot.png to the workdir after
every run. Finished parts are skipped, so the command can be stopped at any time and started again.
docs/scaling_laws.md describes the method.
"""

import ast
from collections.abc import Iterable, Sequence
import dataclasses
import math
import pathlib
import sys
import time

from absl import app, flags, logging
import jax

from benchmarks import experiment as experiment_lib
from benchmarks import scaling_table as table
from benchmarks import scene_retrieval
from cm3leon_jax.checkpoints import reading
from cm3leon_jax.config import UserError
from cm3leon_jax.configs import scenes as config_scenes
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.mesh import create_mesh
from cm3leon_jax.runs import stages
from cm3leon_jax.runs import table as stage_table
from cm3leon_jax.settings import Settings, settings_from_config
from cm3leon_jax.training.watch import flops

CONDITIONS = {"neighbors": "with retrieval", "without": "without"}
# Subset of the held-out scenes -> reasons why its scenes are held out. Means cover all subsets.
# Only the first two subsets are also reported separately and judged.
SUBSETS = {**scene_retrieval.SUBSETS, "pair": ("pair",), "objects": ("objects",)}


@dataclasses.dataclass(frozen=True, order=True)
class Size:
  """Size of a decoder, from which `Scaling.fields` computes the other config fields."""

  width: int
  layers: int
  heads: int

  def __str__(self):
    return f"{self.width}x{self.layers}x{self.heads}"


@dataclasses.dataclass(frozen=True)
class Scaling:
  """Location and size of the experiment.

  Attributes:
    workdir: folder that contains all runs.
    sizes: decoder sizes, ascending, to whose runs the power laws are fitted.
    predicted: decoder size whose bits are predicted before it is trained.
    conditions: keys of `CONDITIONS` that are trained.
    seeds: seeds with which each size and condition is trained.
    tokens_per_parameter: number of training tokens per parameter in matrix products, for the
      predicted size.
    tokens_power: the number of training tokens is proportional to (number of parameters) ^ this
      power.
    learning_rate_power: the learning rate is proportional to width ^ this power.
    judged: maximum number of scenes per subset whose samples are judged.
    given: config field -> value, for the fields that the user sets.
  """

  workdir: pathlib.Path
  sizes: tuple[Size, ...]
  predicted: Size
  conditions: tuple[str, ...]
  seeds: tuple[int, ...]
  tokens_per_parameter: float
  tokens_power: float
  learning_rate_power: float
  judged: int
  given: dict

  def shared_fields(self) -> dict:
    """Returns the config fields whose values are the same in all runs."""
    never = 1_000_000
    without_pauses = {"train.eval_every": never, "train.sample_every": never}
    return {**without_pauses, "train.checkpoint_every": 250, **self.given}

  def fields(self, size: Size, condition: str, seed: int) -> dict:
    """Returns the config fields of a run.

    Let w be the width divided by the width in the config. The feed-forward width is the config's
    value times w, `init_std` is the config's value / sqrt(w), and the learning rate is the config's
    value times w^`learning_rate_power`. Let N be the number of parameters by `flops.matmul_params`,
    and M this number for the predicted size. A run trains on `tokens_per_parameter` x M x (N /
    M)^`tokens_power` tokens, including padding.
    """
    base = self.settings(self.shared_fields())
    fields = {**self.size_fields(base, size), "seed": seed}
    if condition == "without":
      fields["data.num_neighbors"] = 0
    largest, own = (
      flops.matmul_params(self.settings(self.size_fields(base, s)).model)
      for s in (self.predicted, size)
    )
    tokens = self.tokens_per_parameter * largest * (own / largest) ** self.tokens_power
    per_step = base.train.global_batch_size * base.data.sequence_length
    fields["train.steps"] = math.ceil(tokens / per_step)
    return fields

  def size_fields(self, base: Settings, size: Size) -> dict:
    """Returns the config fields of a size, without the number of steps."""
    wider = size.width / base.model.width
    return {
      **self.shared_fields(),
      "model.width": size.width,
      "model.num_layers": size.layers,
      "model.num_heads": size.heads,
      "model.mlp_width": 4 * round(wider * base.model.mlp_width / 4),
      "model.init_std": float(f"{base.model.init_std / math.sqrt(wider):.6g}"),
      "optimizer.learning_rate": float(
        f"{base.optimizer.learning_rate * wider**self.learning_rate_power:.6g}"
      ),
    }

  def settings(self, fields: dict) -> Settings:
    """Returns the validated settings."""
    config = config_scenes.get_config()
    config.update_from_flattened_dict(fields)
    return settings_from_config(config)

  def folder(self, size: Size, condition: str, seed: int) -> pathlib.Path:
    """Returns the workdir of a run, whose name contains the number of steps."""
    steps = self.fields(size, condition, seed)["train.steps"]
    return self.workdir / f"{size}_steps_{steps}" / f"{condition}_seed_{seed}"

  def planned(self, sizes: Iterable[Size]) -> list[tuple[int, Size, str]]:
    """Returns (seed, size, condition) of each run of `sizes`, in the order of training."""
    return [(s, size, name) for s in self.seeds for size in sizes for name in self.conditions]

  def command(self, name: str, workdir: pathlib.Path, fields: dict) -> None:
    """Runs a stage with `experiment.run_stage`."""
    experiment_lib.run_stage(name, "ml_configs/scenes.py", workdir, fields)


def parse_sizes(texts: Sequence[str]) -> tuple[Size, ...]:
  """Parses sizes "WIDTH" or "WIDTHxLAYERSxHEADS"; missing numbers are taken from the config.

  parse_sizes(["64", "96x6x3"]) = (Size(64, 4, 2), Size(96, 6, 3))

  Raises:
    UserError: a text has neither of these forms.
  """
  model = config_scenes.get_config().model
  sizes = []
  for text in texts:
    parts = text.split("x")
    if len(parts) not in (1, 3) or not all(part.isdecimal() and int(part) for part in parts):
      raise UserError(
        f"'{text}' is not a size; a size is WIDTH or WIDTHxLAYERSxHEADS, e.g. 96x6x3."
      )
    numbers = [*map(int, parts), model.num_layers, model.num_heads]
    sizes.append(Size(*numbers[:3]))
  return tuple(sizes)


def parse_fields(texts: Sequence[str]) -> dict:
  """Parses config fields: ["train.log_every=5"] becomes {"train.log_every": 5}."""
  fields = {}
  for text in texts:
    name, found, value = text.partition("=")
    if not found:
      raise UserError(f"--set={text} must be FIELD=VALUE, e.g. train.global_batch_size=8.")
    try:
      fields[name] = ast.literal_eval(value)
    except (ValueError, SyntaxError):
      fields[name] = value
  return fields


def describe(scaling: Scaling, size: Size) -> dict:
  """Returns the number of parameters, steps, tokens and training FLOPs of a size."""
  settings = scaling.settings(scaling.fields(size, "neighbors", 0))
  length = settings.data.sequence_length
  tokens = settings.train.steps * settings.train.global_batch_size * length
  return {
    "size": str(size),
    "parameters": flops.matmul_params(settings.model),
    "learning_rate": settings.optimizer.learning_rate,
    "steps": settings.train.steps,
    "tokens": tokens,
    "flops": flops.model_flops(settings.model, tokens, length),
  }


def measure(settings: Settings, run: pathlib.Path, corpus, condition: str, judged: int) -> dict:
  """Computes the bits of held-out images with a trained decoder, and judges its samples.

  Returns:
    "bits": [n] bits of each image in `corpus`, after its neighbor if the condition is "neighbors".
    "right": for each of m judged captions, whether the sample is correct.
  """
  places, count = scene_retrieval.chosen(corpus, judged), int(condition == "neighbors")
  with jax.set_mesh(create_mesh(settings.mesh)):
    params, _ = reading.load_params(run / "train", settings.model)
    kind = "true" if count else "none"
    scored = scene_retrieval.score(settings, params, corpus, kind)
    right, _ = scene_retrieval.judge(settings, params, run, corpus, places, count)
  return {"bits": scored, "right": right}


def run_one(scaling: Scaling, size: Size, condition: str, seed: int, corpus) -> dict:
  """Trains and measures one decoder, or reads its results if they exist."""
  run, fields = scaling.folder(size, condition, seed), scaling.fields(size, condition, seed)
  experiment_lib.link_stages(scaling.workdir / "shared", run, scene_retrieval.SHARED)
  settings = scaling.settings(fields)
  scaling.command("train", run, fields)

  def measured() -> dict:
    return measure(settings, run, corpus, condition, scaling.judged)

  values = experiment_lib.measured_once(run, {"judged": scaling.judged}, measured)
  return {**values, "size": str(size), "condition": condition, "seed": seed}


def predict_once(path: pathlib.Path, made_of: dict, predictions: dict, started: bool) -> dict:
  """Writes predictions.json once, before the predicted size is trained.

  Args:
    path: path of predictions.json.
    made_of: inputs from which the predictions are computed.
    predictions: predictions as JSON values.
    started: whether the training of the predicted size has begun.

  Returns:
    The predictions of the first call, which the file contains.

  Raises:
    UserError: the file was computed from other inputs, or the training began before it was written.
  """
  if path.exists():
    stages.check_same_config(path, read_json(path)["made_of"], made_of)
  elif started:
    raise UserError(
      f"this size has already been trained, but its prediction {path} was never written: a "
      "prediction must be made before the run. Use another --workdir, or delete the runs of this "
      "size."
    )
  else:
    write_json(path, {"made_of": made_of, "time": time.strftime("%F %T %z"), **predictions})
  return read_json(path)


def predict(scaling: Scaling, about: dict, runs: list[dict]) -> dict:
  """Predicts the bits of the fifth size from the runs, and writes them with `predict_once`."""
  folders = [scaling.folder(size, c, s) for s, size, c in scaling.planned([scaling.predicted])]
  of = {
    str(scaling.folder(size, c, s).relative_to(scaling.workdir)): stages.require(
      scaling.folder(size, c, s), "train"
    )["id"]
    for s, size, c in scaling.planned(scaling.sizes)
  }
  made_of = {
    "runs": of,
    "predicted": describe(scaling, scaling.predicted),
    "seeds": list(scaling.seeds),
  }
  return predict_once(
    scaling.workdir / "predictions.json",
    made_of,
    table.predictions(about, runs),
    any((folder / "train").exists() for folder in folders),
  )


def run_all(scaling: Scaling) -> dict:
  """Prepares the data, trains and measures all sizes, and writes the results after each run."""
  workdir, shared = scaling.workdir, scaling.workdir / "shared"
  fields = scaling.shared_fields()
  for name in scene_retrieval.SHARED:
    scaling.command(stage_table.STAGES[name].command, shared, fields)
  corpus = scene_retrieval.open_corpus(shared, scaling.settings(fields), SUBSETS)
  about = {
    "subsets": corpus.subsets.tolist(),
    "concepts": corpus.concepts.tolist(),
    "judged": scene_retrieval.chosen(corpus, scaling.judged).tolist(),
    "labels": {name: CONDITIONS[name] for name in scaling.conditions},
    "sizes": [describe(scaling, size) for size in (*scaling.sizes, scaling.predicted)],
    "predicted": str(scaling.predicted),
  }
  print(table.plan(about["sizes"]), flush=True)
  small, last = scaling.planned(scaling.sizes), scaling.planned([scaling.predicted])
  runs, result, predicted = [], {}, None
  for number, (seed, size, name) in enumerate([*small, *last], 1):
    if number == len(small) + 1:
      predicted = predict(scaling, about, runs)
    label = f"[{number}/{len(small) + len(last)}]"
    print(f"\n{label} {size}, {CONDITIONS[name]}, seed {seed}", flush=True)
    start = time.time()
    runs.append(run_one(scaling, size, name, seed, corpus))
    print(f"{label} {time.time() - start:.0f} s.", flush=True)
    result = table.summarize(about, runs, predicted)
    experiment_lib.write_results(workdir, result, table.markdown(result))
    table.plot(result, workdir / "plot.png")
  return result


def scaling_from_flags(argv: Sequence[str], args) -> Scaling:
  """Checks the flags; raises UserError if a flag is invalid."""
  sizes, (predicted, *others) = parse_sizes(args.sizes), parse_sizes(args.predicted)
  if others or predicted in sizes or sorted(set(sizes)) != list(sizes):
    raise UserError("--sizes must be in ascending order, and --predicted must be a different size.")
  return Scaling(
    workdir=pathlib.Path(args.workdir).resolve(),
    sizes=sizes,
    predicted=predicted,
    conditions=tuple(experiment_lib.chosen_conditions(argv, args.conditions, CONDITIONS)),
    seeds=tuple(map(int, args.seeds)),
    tokens_per_parameter=args.tokens_per_parameter,
    tokens_power=args.tokens_power,
    learning_rate_power=args.learning_rate_power,
    judged=args.judged,
    given={**experiment_lib.OLDER, "scenes.heldout": args.heldout, **parse_fields(args.set)},
  )


def main(argv) -> None:
  args = flags.FLAGS
  logging.set_verbosity(logging.WARNING)
  try:
    scaling = scaling_from_flags(argv, args)
    if args.plan:
      sizes = (*scaling.sizes, scaling.predicted)
      print(table.plan([describe(scaling, size) for size in sizes]))
      return
    result = run_all(scaling)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  print(
    f"\n{table.markdown(result)}\n"
    f"scaling: results.json, table.md and plot.png are in {scaling.workdir}."
  )


def define_flags() -> None:
  """Defines the flags of this command."""
  flags.DEFINE_string(
    "workdir", "workdir/scaling", "Folder of all runs; finished parts are skipped."
  )
  flags.DEFINE_list(
    "sizes", ["56", "68", "84", "104"], "Sizes for the fits: WIDTH or WIDTHxLAYERSxHEADS."
  )
  flags.DEFINE_list("predicted", ["128"], "Size that is predicted before it is trained.")
  flags.DEFINE_list("conditions", list(CONDITIONS), "Conditions to run.")
  flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of every size and condition.")
  flags.DEFINE_float(
    "tokens_per_parameter", 3.0, "Training tokens per parameter of the predicted size.", 1e-6
  )
  flags.DEFINE_float(
    "tokens_power", 1.0, "The tokens of a run are proportional to parameters to this power."
  )
  flags.DEFINE_float(
    "learning_rate_power", -1.0, "The learning rate is proportional to width to this power."
  )
  flags.DEFINE_integer("heldout", 2_100, "Held-out scenes.", lower_bound=7)
  flags.DEFINE_integer("judged", 100, "Maximum number of judged scenes per subset.", 2)
  flags.DEFINE_multi_string("set", [], "Another value of a config field in all runs: FIELD=VALUE.")
  flags.DEFINE_bool("plan", False, "Print parameters, steps and FLOPs of the sizes, and exit.")


if __name__ == "__main__":  # Tests import this module without flags.
  define_flags()
  app.run(main)
