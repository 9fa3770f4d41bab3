"""Combines all sections of a config into one checked, frozen dataclass."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

import ml_collections
from pydantic import NonNegativeInt
import pydantic.dataclasses

from cm3leon_jax.config.build import STRICT, build
from cm3leon_jax.config.data import DataConfig, RawConfig, RetrievalConfig
from cm3leon_jax.config.groups import Groups, Tuned
from cm3leon_jax.config.instructions import InstructionsConfig
from cm3leon_jax.config.model import AdapterConfig, ModelConfig
from cm3leon_jax.config.sampling import EvaluationConfig, SamplingConfig
from cm3leon_jax.config.tokenizers import CLIPConfig, TextTokenizerConfig, VQGANConfig, check_levels
from cm3leon_jax.config.training import OptimizerConfig, ReinforceConfig, TrainConfig
from cm3leon_jax.errors import UserError
from cm3leon_jax.mesh import MeshConfig
from cm3leon_jax.vocab import VocabLayout

SPLIT_BY_TENSOR = ("num_heads", "num_kv_heads", "mlp_width")  # Sizes of axes split over `tensor`.


def decoding_mesh(model: ModelConfig, devices: Sequence[Any]) -> MeshConfig:
  """Returns a mesh for generation on all devices, on which no step gathers the parameters.

  `tensor` spans the devices of a host, as far as it divides the model's axes, and `data` the rest.
  CPU devices, which share one memory, have the default mesh.

    8 GPUs of a host, 32 heads: MeshConfig(data=1, fsdp=1, tensor=8)
  """
  if devices[0].platform == "cpu":
    return MeshConfig()
  local = sum(device.process_index == devices[0].process_index for device in devices)
  sizes = (getattr(model, field) for field in (*SPLIT_BY_TENSOR, "vocab_size"))
  tensor = math.gcd(local, *sizes)
  return MeshConfig(len(devices) // tensor, 1, tensor)


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Settings:
  """A checked config with one frozen dataclass per section."""

  seed: NonNegativeInt
  """Seed of all random numbers in the run."""
  vocab: VocabLayout
  raw: RawConfig
  text_tokenizer: TextTokenizerConfig
  vqgan: VQGANConfig
  clip: CLIPConfig
  retrieval: RetrievalConfig
  data: DataConfig
  instructions: InstructionsConfig
  model: ModelConfig
  adapter: AdapterConfig
  mesh: MeshConfig
  optimizer: OptimizerConfig
  train: TrainConfig
  reinforce: ReinforceConfig
  sampling: SamplingConfig
  evaluation: EvaluationConfig

  def __post_init__(self) -> None:
    if self.model.vocab_size != self.vocab.size:
      raise ValueError(
        f"model.vocab_size is {self.model.vocab_size}; it must be vocab.size = {self.vocab.size}: "
        "leave it out."
      )
    if self.model.max_positions < self.data.sequence_length:
      raise ValueError(
        f"model.max_positions is {self.model.max_positions}; "
        f"it must be at least data.sequence_length = {self.data.sequence_length}."
      )
    if self.model.align_images and self.vocab.template != "cm3leon":
      raise ValueError(
        f"model.align_images is True, but vocab.template is '{self.vocab.template}', whose images "
        "begin and end with tokens of their own: set align_images to False."
      )
    if self.model.align_images and self.data.interleaved_share:
      raise ValueError(
        "model.align_images is True, but data.interleaved_share is "
        f"{self.data.interleaved_share}; set one of them to 0: the position of text before an "
        "image in an interleaved document is not known while it is generated."
      )
    if self.adapter.rank and self.train.only:
      raise ValueError(
        f"adapter.rank is {self.adapter.rank}, but train.only is {self.train.only}: a run trains "
        "either adapters or groups of parameters, so set rank to 0 or only to ()."
      )
    if isinstance(self.tuned, AdapterConfig):
      self.tuned.matrices(self.model)
    elif self.tuned:
      self.tuned.check(self.model)
    if self.data.phases:
      self.phases()  # Raises an error if a field of a phase is wrong.
    if self.vqgan.quantizer == "fsq":
      check_levels(self.vocab.image_size, self.vqgan.code_dim)
    for field in SPLIT_BY_TENSOR:
      size = getattr(self.model, field)
      if self.mesh.tensor > 0 and size % self.mesh.tensor:
        raise ValueError(
          f"mesh.tensor is {self.mesh.tensor}; it must divide model.{field} = {size}."
        )

  def phases(self) -> tuple[tuple[int, "Settings"], ...]:
    """Returns each phase's first row and settings, those of row 0 first: `DataConfig.phases`."""
    now = dataclasses.replace(self, data=dataclasses.replace(self.data, phases=()))
    result = [(0, now)]
    for first, fields in self.data.phases:
      place, old = f"data.phases, row {first}", {**dataclasses.asdict(now.data)}
      tasks = now.instructions
      if (name := "replay_share") in fields:
        if not tasks.replay_share:
          raise UserError(
            f"config.{place} sets {name}, so config.instructions.{name} must be above 0."
          )
        tasks = build(type(tasks), {**vars(tasks), name: fields[name]}, place)
      data = build(DataConfig, old | {k: v for k, v in fields.items() if k != name}, place)
      now = dataclasses.replace(now, data=data, instructions=tasks)
      result.append((first, now))
    return tuple(result)

  @property
  def tuned(self) -> Tuned | None:
    """What the run trains of a model that is otherwise frozen; None: all parameters."""
    if self.train.only:
      return Groups(self.train.only, self.vocab.text_size)
    return self.adapter if self.adapter.rank else None

  def check_split(self, axes: Mapping[str, int]) -> None:
    """Raises ValueError unless the parameters can be split evenly over the mesh axes."""
    fsdp = axes["fsdp"] * axes["fsdp_inner"]
    tensor = axes["tensor"]
    split = {"width": fsdp, "vocab_size": fsdp * tensor, **dict.fromkeys(SPLIT_BY_TENSOR, tensor)}
    for field, parts in split.items():
      if (size := getattr(self.model, field)) % parts:
        copies = axes["data"] * fsdp
        raise ValueError(
          f"model.{field} = {size:,} does not split into {parts} equal parts (fsdp = "
          f"{axes['fsdp']}, fsdp_inner = {axes['fsdp_inner']}, tensor = {axes['tensor']}): use "
          "another number of devices, or replicas of the model: --config.mesh.fsdp=1 "
          f"--config.mesh.fsdp_inner=1 --config.mesh.data={copies}."
        )


SECTIONS: dict[str, Any] = {
  f.name: f.type for f in dataclasses.fields(Settings) if f.name != "seed"
}


def default_of(field: dataclasses.Field) -> Any:
  """Returns the default of a field of a section."""
  if field.default_factory is not dataclasses.MISSING:
    return field.default_factory()
  return field.default


def default_config() -> ml_collections.ConfigDict:
  """Returns a config with the defaults of all fields, so that a flag can override each of them.

  `model.vocab_size` is None, because `settings_from_config` computes it from `vocab`.
  """
  sections = {
    name: {f.name: default_of(f) for f in dataclasses.fields(cls)} for name, cls in SECTIONS.items()
  }
  config = ml_collections.ConfigDict({"seed": 0, **sections})
  config.model.vocab_size = ml_collections.config_dict.placeholder(int)
  return config


def settings_from_config(config: Mapping[str, Any] | ml_collections.ConfigDict) -> Settings:
  """Builds and checks the settings of a config.

  Raises:
    UserError: a section or field is unknown, or a value is wrong. The message names it.
  """
  unknown = sorted(set(config) - {"seed", *SECTIONS})
  if unknown:
    raise UserError(
      f"config has an unknown section '{unknown[0]}': the sections are seed, {', '.join(SECTIONS)}."
    )
  vocab = build(VocabLayout, config["vocab"], "vocab")
  model = dict(config["model"])
  if model.get("vocab_size") is None:
    model["vocab_size"] = vocab.size
  values = {**dict(config), "model": model}
  sections = {name: build(cls, values[name], name) for name, cls in SECTIONS.items()}
  return build(Settings, {"seed": config["seed"], **sections})


def settings_from_stored(values: dict) -> Settings:
  """Builds the settings that a run or bundle stored. Sections that are missing get their defaults.

  Raises:
    UserError: another version of this package stored them, or see `settings_from_config`.
  """
  known = {name: {field.name for field in dataclasses.fields(x)} for name, x in SECTIONS.items()}
  for name, section in values.items():
    if unknown := set(section if isinstance(section, dict) else ()) - known.get(name, set()):
      raise UserError(
        f"the settings have a field {name}.{min(unknown)}, which another version of cm3leon_jax "
        "stored: use that version."
      )
  return settings_from_config({**default_config().to_dict(), **values})


def describe(settings: Settings) -> list[str]:
  """Returns one line `section.field = value` per field, with the default if the value differs.

  train.steps = 5  # default: 41723
  """
  lines = [f"seed = {settings.seed}" + ("  # default: 0" if settings.seed else "")]
  for name, cls in SECTIONS.items():
    for field in dataclasses.fields(cls):
      value = getattr(getattr(settings, name), field.name)
      default = default_of(field)
      note = "" if value == default else f"  # default: {default!r}"
      lines.append(f"{name}.{field.name} = {value!r}{note}")
  return lines
