"""Defines flags that several commands take; the dataclass of a command inherits from these."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from etils import epath, epy
from pydantic import PositiveInt

from cm3leon_jax.commands import flag
from cm3leon_jax.config.build import build
from cm3leon_jax.config.sampling import SamplingConfig
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.errors import UserError
from cm3leon_jax.stages import shards

with epy.lazy_imports():
  from cm3leon_jax.run import run

SAMPLING = flag.of_section(SamplingConfig, "sampling", without={"guidance"})
Dtype = Literal["compute", "int8"]


@dataclasses.dataclass(frozen=True)
class Workdir(flag.Fields):
  workdir: str | None = None
  """Folder of the run; each stage writes to a subfolder."""


@dataclasses.dataclass(frozen=True)
class PrintConfig(flag.Fields):
  print_config: bool = False
  """Print every field of the checked config, one per line, and exit."""


@dataclasses.dataclass(frozen=True)
class Processes(flag.Fields):
  """Flags of commands that can run in several processes."""

  distributed: bool = False
  """Join the processes that the cluster (TPU pod, SLURM, ...) started."""
  coordinator_address: str | None = None
  """host:port of process 0; for jobs without --distributed."""
  num_processes: int | None = None
  """Number of processes of the job."""
  process_id: int | None = None
  """Number of this process, from 0."""
  coordinator_timeout: PositiveInt = 300
  """Seconds that the processes wait for each other."""


@dataclasses.dataclass(frozen=True)
class InitFrom(flag.Fields):
  init_from: str = ""
  """Trained run that a new run starts from: the workdir of another run, a bundle that `cm3leon
  export --bundle` wrote, or an installed model (scenes, scenes-instruct, illustrations). For
  cm3leon run, the default is config.train.base, and none is no run. train and reinforce
  start from its parameters (the moving average, if there is one) with a new optimizer state;
  they also accept an export in the format hf or orbax. copy_tokenizers copies its tokenizers and
  CLIP."""
  own_image_tokenizer: bool = False
  """Train an image tokenizer on the images of this run, instead of copying that of --init_from. The
  decoder then learns new image codes, and forgets the images of --init_from."""


@dataclasses.dataclass(frozen=True)
class Training(InitFrom):
  allow_changed: flag.Listed = ()
  """Config fields whose values may differ from the values at the start of the run, e.g.
  optimizer.learning_rate. The command prints the consequences, and train/config.json lists the
  changes."""
  skip_memory_check: bool = False
  """Start even if the estimate of a step's memory exceeds the memory of a device."""


@dataclasses.dataclass(frozen=True)
class Runner(flag.Fields):
  """Flags of stages that process shards."""

  runner: Annotated[str, flag.one_of(shards.RUNNERS)] = "local"
  """Process shards in this process or on Ray workers."""
  ray_address: str = ""
  """Ray cluster, e.g. auto or ray://host:10001; empty: start one on this machine."""
  ray_workers: PositiveInt = 1
  """Number of Ray workers; each processes one shard at a time."""
  ray_worker_cpus: float = 1.0
  """CPUs that Ray reserves for each worker."""

  def of_shards(self) -> shards.Runner:
    return shards.Runner(self.runner, self.ray_address, self.ray_workers, self.ray_worker_cpus)


@dataclasses.dataclass(frozen=True)
class Limits(flag.Fields):
  """Limits of how a copied image tokenizer reconstructs the images of a run."""

  min_psnr: float = 15.0
  """Least mean PSNR, in dB, with which a copied image tokenizer must reconstruct the background and
  the drawing of 16 images of this run; 0: any."""
  max_color_difference: float = 9.0
  """Largest mean difference of color, in CIE Lab, between 16 images of this run and their
  reconstructions by a copied image tokenizer; 0: any."""

  @property
  def limits(self) -> tuple[float, float]:
    return self.min_psnr, self.max_color_difference


@dataclasses.dataclass(frozen=True)
class Encoding(Runner, Limits):
  """Flags of the commands that encode images."""


@dataclasses.dataclass(frozen=True)
class Files(flag.Fields):
  """Flags of commands that read a user's files and write results."""

  out: str | None = None
  """Folder in which the results folder is created. Default: the workdir of a run, or the current
  folder for a bundle."""
  allow_outside: bool = False
  """Whether lines may name URLs, or images outside the folder of their file. Set it only for files
  that you trust, since a line can name any file on this machine."""

  def results_folder(self, trained: run.Run) -> epath.Path:
    """Returns --out. Its default is the workdir of a run or, for a bundle, the current folder."""
    default = epath.Path() if trained.kind == "bundle" else trained.folder
    return default if self.out is None else epath.Path(self.out)


@dataclasses.dataclass(frozen=True)
class Retrieve(flag.Fields):
  retrieve: flag.Listed | None = None
  """Number of retrieved documents. score takes one number (default: 0). generate takes several,
  e.g. 0,2. Its default for held-out captions is 0 and config.data.num_neighbors; for a prompt it
  is config.data.num_neighbors in text_to_image, and 0 in other tasks."""


@dataclasses.dataclass(frozen=True)
class Sampling(flag.Fields):
  sampling: dict[str, Any] = SAMPLING

  def check_sampling(self) -> None:
    """Raises UserError for a wrong value."""
    try:
      build(SamplingConfig, self.sampling, "sampling")
    except UserError as error:
      raise UserError(str(error).replace("config.sampling.", "--")) from error

  def applied(self, settings: Settings) -> Settings:
    """Returns the settings with the fields of config.sampling that flags set."""
    self.check_sampling()
    sampling = dataclasses.replace(settings.sampling, **self.sampling)
    return dataclasses.replace(settings, sampling=sampling)


@dataclasses.dataclass(frozen=True)
class Programs(flag.Fields):
  """Flags of commands that keep compiled programs."""

  cache_dir: str | None = None
  """Folder that keeps compiled programs for the next start; an empty value disables it. Default:
  JAX_COMPILATION_CACHE_DIR or, if that is not set, cm3leon_jax/programs in XDG_CACHE_HOME or
  ~/.cache."""
  weight_dtype: Dtype = "compute"
  """Dtype of the model's matrices."""
  cache_dtype: Dtype = "compute"
  """Dtype of the cache entries."""
