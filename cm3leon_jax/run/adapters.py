"""Reads the adapters, or the groups of parameters, that a run trained on frozen parameters."""

import dataclasses

from etils import epath
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from cm3leon_jax.config.groups import Groups, Tuned
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.files import foreign
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.models import adapters
from cm3leon_jax.run.source import settings_of_run
from cm3leon_jax.weights import reading
from cm3leon_jax.weights.stored import STACKED, StoredParams


@dataclasses.dataclass(frozen=True)
class ParamsRef:
  """Reference to trained parameters on disk, as train/config.json records it under "init_from".

  Attributes:
    source: a path or name as the user gave it, see `Source`. For the base of adapters,
      the path is absolute.
    step: step of the checkpoint; None for an exported model.
    digest: SHA-256 of the exported file. For several files or a checkpoint, the SHA-256 of the
      digests of the files.
  """

  source: str
  step: int | None
  digest: str | None


@dataclasses.dataclass(frozen=True)
class Adapters:
  """Trained adapters or groups on disk, and a reference to the parameters that they tune.

  Attributes:
    folder: workdir of the run.
    base: the parameters that the adapters are added to.
  """

  folder: epath.Path
  config: Tuned
  base: ParamsRef

  @property
  def settings(self) -> Settings:
    """Settings of the run that trained the adapters."""
    return settings_of_run(self.folder)

  def load(self, step: int | None = None, average: bool = True) -> tuple[dict, int]:
    """Loads the adapters onto the current mesh, and returns them with their step.

    The arguments and the errors are those of `reading.load_params`.
    """
    model = self.settings.model
    return reading.load_params(self.folder / "train", model, step, average, self.config)


@foreign.reads("a run with adapters")
def of_run(workdir: epath.PathLike) -> Adapters | None:
  """Returns the adapters that a run trains; None if it trains all parameters."""
  folder = epath.Path(workdir)
  path = folder / "train" / "config.json"
  run = read_json(path, {"run": dict})["run"] if path.exists() else {}
  if "adapter" not in run and "only" not in run.get("train", {}):
    return None
  if (config := settings_of_run(folder).tuned) is None:
    raise ValueError("settings without what `run` says that the run trains")
  return Adapters(folder, config, ParamsRef(**run["init_from"]))


def merged(base: StoredParams, trained: dict, found: Adapters) -> StoredParams:
  """Returns the parameters of a decoder with what was trained of them; see `groups.merge`.

  They are merged when they are read, those of layers one layer at a time.
  """
  trained = jax.device_get(trained)
  flat = traverse_util.flatten_dict(trained, sep=".")
  tuned, model = found.config, found.settings.model

  def layer(kind: str, i: int) -> np.ndarray:
    stored = base.read(f"{STACKED}.{kind}", i)
    if isinstance(tuned, Groups):
      layers = tuned.layers(model)
      return trained[STACKED][kind][layers.index(i)] if i in layers else stored
    names = {*kind} if kind in ("q", "kv", "qkv") else {kind}
    factors = {x: jax.tree.map(lambda f: f[[i]], trained[x]) for x in names & trained.keys()}
    params = adapters.merge({STACKED: {kind: jnp.asarray(stored)[None]}}, factors, tuned)
    return np.asarray(params[STACKED][kind])[0]

  def read(name: str, *index: int) -> np.ndarray:
    room, _, kind = name.partition(".")
    if room == STACKED:
      layers = index[:1] or range(model.num_layers)
      read = np.stack([layer(kind, i)[index[1:]] for i in layers])
      return read[0] if index else read
    if isinstance(tuned, Groups) and name in flat:
      first = tuned.first_row(name) or 0
      return np.concatenate([base.read(name)[:first], flat[name]])[index]
    return base.read(name, *index)

  return dataclasses.replace(base, read=read)
