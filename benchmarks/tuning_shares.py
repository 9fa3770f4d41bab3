"""Measures how much each task of instruction tuning contributes to the loss and its gradient.

  python -m benchmarks.tuning_shares --config=ml_configs/scenes_instruct.py \
    --data=workdir/scenes_instruct --models=scenes,workdir/scenes_instruct

`--data` is a workdir of the config whose stages before the training are finished. `--models` are
runs or bundles with the same model. For each source of rows (a task, or documents), the program
prints its share of the positions, the share of its positions that have a loss, and its share of the
loss weight. For each model it also prints, from `--rows` rows of each source alone:

- norm: share in the sum of the norms of the sources' gradients.
- gradient: component of the source's gradient along the gradient of the whole loss, relative to the
  norm of the latter. These values sum to 1. A negative value opposes the other sources.
- noise: share of the variance of a training step's gradient.
- cosine: cosine between the source's gradient and the sum of the gradients of all other sources.

Gradients are weighted as in the training, and norms are estimated without the bias of few rows. The
table has "-" for a norm that is smaller than its error, and for its cosine. results.json has the
norms, their errors (null: an estimate below 0) and the cosine of each pair of sources.
"""

# S sources of rows, P parts of a source's rows, n parameters.

from collections.abc import Callable, Sequence
import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple

from absl import app, flags, logging
from etils import epath
import jax
from ml_collections import config_flags
import numpy as np

from benchmarks.experiment import write_results
from cm3leon_jax.data.rows.loader import RowLoader
from cm3leon_jax.data.rows.plan import RowPlan
from cm3leon_jax.data.rows.plan_statistics import describe_loss, loss_statistics, plan_statistics
from cm3leon_jax.mesh import batch_shards, create_mesh, shard
from cm3leon_jax.models import transformer
from cm3leon_jax.models.config import ModelConfig
from cm3leon_jax.settings import Settings, settings_from_config
from cm3leon_jax.trained.run import Run
from cm3leon_jax.training.step import loss

COLUMNS = ("norm", "gradient", "noise", "cosine")


class Sums(NamedTuple):
  """Sums over the P parts of a source's rows.

  Attributes:
    gradient: gradient of the summed loss of all parts, [n] float64.
    squares: sum of the squared norms of the parts' gradients.
    weights: loss weight of each part, [P].
  """

  gradient: np.ndarray
  squares: float
  weights: np.ndarray


class Gradients(NamedTuple):
  """Gradients of the sources of rows. Each is divided by the loss weight of its source's targets.

  Attributes:
    products: inner products of the sources' mean gradients, without bias, [S, S].
    variances: variance of a gradient that is computed on a loss weight of 1, [S].
    weights: sum of the loss weights on which the mean gradients were computed, [S].
  """

  products: np.ndarray
  variances: np.ndarray
  weights: np.ndarray


def gradients_of(sources: Sequence[Sums]) -> Gradients:
  """Estimates products and variances from independent parts of each source.

  The squared norm of a mean of P gradients is too large by its variance. The mean product of two
  different parts is not.
  """
  means, squares, variances = [], [], []
  for gradient, of_parts, weights in sources:
    count, mean = len(weights), gradient / weights.sum()
    own = of_parts / weights.mean() ** 2
    square = float(count**2 * mean @ mean - own) / (count * (count - 1))
    means.append(mean)
    squares.append(square)
    variances.append(max(0.0, own / count - square) * weights.mean())
  products = np.stack(means) @ np.stack(means).T
  np.fill_diagonal(products, squares)
  return Gradients(products, np.array(variances), np.array([x.weights.sum() for x in sources]))


def contributions(
  gradients: Gradients, loss_shares: np.ndarray, step_weight: float
) -> dict[str, Any]:
  """Computes what each source contributes to the gradient of the whole loss.

    products [[4 0] [0 1]], loss_shares [.5 .5]: the sources have the gradients (1 0) and (0 .5)
    norm = [2/3 1/3], norms = [1 .5], gradient = [.8 .2], cosine = [0 0], total = sqrt(1.25)

  Args:
    loss_shares: share of each source in the loss weight, [S].
    step_weight: sum of the loss weights of a training step.

  Returns:
    `norm`, `gradient`, `noise` and `cosine`, each [S], see the module; `norms` and `errors`, each
    [S]: the norm of each source's gradient and the standard deviation of the estimated gradient;
    `cosines`, [S, S]; `total` and `error`, the same values for the gradient of the whole loss;
    `step_deviation`, the standard deviation of a training step's gradient.
  """
  weighted = gradients.products * np.outer(loss_shares, loss_shares)
  diagonal, sums = np.diag(weighted), weighted.sum(1)
  norms, others = _root(diagonal), _root(sums.sum() - 2 * sums + diagonal)
  total, noise = _root(sums.sum()), loss_shares * gradients.variances
  errors = np.sqrt(loss_shares * noise / gradients.weights)
  return {
    "norm": norms / np.nansum(norms),
    "gradient": sums / total**2,
    "noise": noise / noise.sum(),
    "cosine": (sums - diagonal) / (norms * others),
    "cosines": weighted / np.outer(norms, norms),
    "norms": norms,
    "errors": errors,
    "total": float(total),
    "error": float(np.linalg.norm(errors)),
    "step_deviation": float(np.sqrt(noise.sum() / step_weight)),
  }


def _root(squares: Any) -> Any:
  """Returns square roots; nan for an estimate that is not positive."""
  return np.sqrt(np.where(np.asarray(squares) > 0, squares, np.nan))


def gradient_of(config: ModelConfig, z_loss: float = 0.0) -> Callable[[dict, dict], np.ndarray]:
  """Returns a function (params, batch) -> gradient of the summed loss, [n] float32."""

  @jax.jit
  def compute(params: dict, batch: dict) -> dict:
    def summed(params: dict) -> loss.Scalar:
      return loss.batch_nll(transformer.bind(config, params), batch, z_loss)[0]

    return jax.grad(summed)(params)

  def flattened(params: dict, batch: dict) -> np.ndarray:
    placed = {name: shard(x, "batch", "length") for name, x in batch.items()}
    grads = jax.device_get(compute(params, placed))
    return np.concatenate([np.asarray(x, np.float32).ravel() for x in jax.tree.leaves(grads)])

  return flattened


def sums_of(
  loader: RowLoader, source: int, count: int, size: int, gradient: Callable[[dict], np.ndarray]
) -> Sums:
  """Sums the gradients of `count` batches of `size` rows that contain only one source."""
  plan = loader.plan
  alone = dataclasses.replace(plan.sources[source], share=1.0)
  rows = RowLoader(
    RowPlan([alone], plan.config, plan.max_spans, plan.seed), loader.vocab, loader.align_images
  )
  total, squares, weights = np.zeros(1), 0.0, []
  for part in range(count):
    some = [rows[i] for i in range(part * size, (part + 1) * size)]
    batch = {name: np.stack([row[name] for row in some]) for name in some[0]}
    of_part = gradient(batch).astype(np.float64)
    total = total + of_part
    squares += float(of_part @ of_part)
    weights.append(batch["loss_weights"].sum(dtype=np.float64))
  return Sums(total, squares, np.array(weights))


def measure(loader: RowLoader, model: str, settings: Settings, rows: int) -> Gradients:
  """Measures the gradients of all sources at the parameters of a run or bundle."""
  with jax.set_mesh(create_mesh(settings.mesh)):
    size = batch_shards()
    params, _ = Run.open(model, settings).params()
    compute = gradient_of(settings.model, settings.optimizer.z_loss)
    gradient = functools.partial(compute, params)
    sums = []
    for number, source in enumerate(loader.plan.sources):
      sums.append(sums_of(loader, number, max(2, rows // size), size, gradient))
      print(f"{model}: {source.name}", flush=True)
  return gradients_of(sums)


def table(names: Sequence[str], shares: dict, models: dict) -> str:
  """Formats the shares and the contributions of each model as a Markdown table."""
  titles = ["source", "positions", "with a loss", "loss weight"]
  titles += [f"{model}: {column}" for model in models for column in COLUMNS]
  lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
  columns = [shares[name] for name in ("source_shares", "target_shares", "loss_shares")]
  for i, name in enumerate(names):
    cells = [name, *(f"{column[i]:.1%}" for column in columns)]
    for values in models.values():
      known = values["norms"][i] > values["errors"][i]
      cells.append(f"{values['norm'][i]:.1%}" if known else "-")
      cells += [f"{values[column][i]:.1%}" for column in ("gradient", "noise")]
      cells.append(f"{values['cosine'][i]:.2f}" if known else "-")
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def without_nan(values: Any) -> Any:
  """Converts arrays to lists, and nan to None, which JSON can store."""
  if isinstance(values, np.ndarray):
    return [without_nan(value) for value in values]
  return None if np.isnan(values) else float(values)


def main(argv: Sequence[str]) -> None:
  del argv
  args = flags.FLAGS
  logging.set_verbosity(logging.WARNING)
  settings = settings_from_config(args.config)
  loader = Run(epath.Path(args.data), settings).rows("train")
  names = [source.name for source in loader.plan.sources]
  shares = {**plan_statistics(loader.plan), **loss_statistics(loader.plan)}
  print(describe_loss(shares, names), flush=True)
  weight = shares["weight_per_row"] * settings.train.global_batch_size
  result = {"sources": names, "rows": args.rows, "shares": shares, "models": {}}
  workdir, models = pathlib.Path(args.workdir), {}
  workdir.mkdir(parents=True, exist_ok=True)
  for model in args.models:
    gradients = measure(loader, model, settings, args.rows)
    found = contributions(gradients, np.array(shares["loss_shares"]), weight)
    print(
      f"{model}: the gradient of the whole loss has the norm {found['total']:.3g}, with a standard "
      f"deviation of {found['error']:.2g} by the choice of rows. A step's gradient has a standard "
      f"deviation of {found['step_deviation']:.2g}.",
      flush=True,
    )
    models[model] = found
    result["models"][model] = {name: without_nan(values) for name, values in found.items()}
    write_results(workdir, result, table(names, shares, models))
  print(table(names, shares, models))


if __name__ == "__main__":  # Tests import this module without flags.
  config_flags.DEFINE_config_file("config", "ml_configs/scenes_instruct.py", "Config file.")
  flags.DEFINE_string("data", "workdir/scenes_instruct", "Workdir with the stores of the rows.")
  flags.DEFINE_list("models", ["scenes"], "Runs or bundles with the tokenizers of --data.")
  flags.DEFINE_integer("rows", 64, "Rows of each source.", lower_bound=4)
  flags.DEFINE_string("workdir", "workdir/tuning_shares", "Folder of the results.")
  app.run(main)
