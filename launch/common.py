"""What every command shares: the --config and --workdir flags, the checked settings, and how a user's mistake is told."""

import dataclasses
import sys

from absl import app, flags
from etils import epath
from ml_collections import config_flags

from cm3leon_jax.config import UserError, build
from cm3leon_jax.data.plan import DataConfig
from cm3leon_jax.data.raw_pairs import RawConfig
from cm3leon_jax.decoding.sampling import SamplingConfig
from cm3leon_jax.evaluation.bits import EvaluationConfig
from cm3leon_jax.mesh import MeshConfig
from cm3leon_jax.models.config import ModelConfig
from cm3leon_jax.retrieval.clip import CLIPConfig
from cm3leon_jax.retrieval.neighbors import RetrievalConfig
from cm3leon_jax.tokenizers.text import TextTokenizerConfig
from cm3leon_jax.tokenizers.vqgan import VQGANConfig
from cm3leon_jax.training.optimizer import OptimizerConfig
from cm3leon_jax.training.train import TrainConfig
from cm3leon_jax.vocab import VocabLayout

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file, e.g. ml_configs/openmoji.py; fields: --config.train.steps=100."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, local or gs://; every stage has a folder of its own in it.")
flags.mark_flags_as_required(["config", "workdir"])


@dataclasses.dataclass(frozen=True)
class Settings:
  """A checked config: one frozen dataclass per section."""

  seed: int
  vocab: VocabLayout
  raw: RawConfig
  text_tokenizer: TextTokenizerConfig
  vqgan: VQGANConfig
  clip: CLIPConfig
  retrieval: RetrievalConfig
  data: DataConfig
  model: ModelConfig
  mesh: MeshConfig
  optimizer: OptimizerConfig
  train: TrainConfig
  sampling: SamplingConfig
  evaluation: EvaluationConfig

  def __post_init__(self):
    if self.model.vocab_size != self.vocab.size:
      raise ValueError(f"model.vocab_size is {self.model.vocab_size}; it must be vocab.size = {self.vocab.size}.")
    if self.model.max_positions < self.data.sequence_length:
      raise ValueError(
        f"model.max_positions is {self.model.max_positions}; "
        f"it must be at least data.sequence_length = {self.data.sequence_length}."
      )


def settings_from_config(config) -> Settings:
  """Builds every section. Raises UserError naming the section and field that is unknown or out of range."""
  sections = {f.name: f.type for f in dataclasses.fields(Settings)}
  unknown = sorted(set(config) - set(sections))
  if unknown:
    raise UserError(f"config has no section '{unknown[0]}': it has {', '.join(sections)}.")
  built = {name: build(cls, config[name], name) if name != "seed" else int(config.seed) for name, cls in sections.items()}
  try:
    return Settings(**built)
  except ValueError as error:
    raise UserError(f"config: {error}") from error


def run(main) -> None:
  """Runs `main(settings, workdir)` as an absl app; a UserError becomes one sentence on stderr and exit code 2."""

  def checked(argv):
    try:
      if len(argv) > 1:
        raise UserError(f"unexpected argument '{argv[1]}': commands take flags only (--name=value).")
      main(settings_from_config(_CONFIG.value), epath.Path(_WORKDIR.value))
    except UserError as error:
      print(f"error: {error}", file=sys.stderr)
      sys.exit(2)

  app.run(checked)
