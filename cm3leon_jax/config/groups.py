"""Defines the groups of parameters that `train.only` names."""

import dataclasses
import re
from typing import TypeAlias

from cm3leon_jax.config.model import AdapterConfig, ModelConfig

GROUP = re.compile(r"(?:embed|head)(?:\.image)?|layers(?:\.(\d+)-(\d+))?")


@dataclasses.dataclass(frozen=True)
class Groups:
  """Groups of a model's parameters that are trained, while the others are frozen.

  Attributes:
    names: names of the groups, see `TrainConfig.only`.
    text_size: first row of the tables that belongs to an image code.
  """

  names: tuple[str, ...]
  text_size: int

  def first_row(self, table: str) -> int | None:
    """Returns the first trained row of the table "embed" or "head"; None: the table is frozen."""
    if table in self.names:
      return 0
    return self.text_size if f"{table}.image" in self.names else None

  def layers(self, model: ModelConfig) -> range:
    """Returns the numbers of the trained layers, from 0."""
    for match in map(GROUP.fullmatch, self.names):
      if match and match[1]:
        return range(int(match[1]), int(match[2]) + 1)
    return range(model.num_layers if "layers" in self.names else 0)

  def backward(self, model: ModelConfig) -> int:
    """Counts the layers of the backward pass: all those after the first trained parameter."""
    if self.first_row("embed") is not None:
      return model.num_layers
    return model.num_layers - layers.start if (layers := self.layers(model)) else 0

  def check(self, model: ModelConfig) -> None:
    """Raises ValueError if the model has no such parameters, or has no others."""
    if model.traits.tied and self.first_row("head") is not None:
      raise ValueError(
        f"train.only is {self.names}, but the output table of family '{model.family}' is its input "
        "table: name embed or embed.image."
      )
    if (stop := self.layers(model).stop) > model.num_layers:
      raise ValueError(
        f"train.only is {self.names}, but the last layer of model.num_layers = {model.num_layers} "
        f"is {model.num_layers - 1}, not {stop - 1}."
      )
    if {*self.names} | ({"head"} if model.traits.tied else set()) == {"embed", "head", "layers"}:
      raise ValueError(f"train.only is {self.names}, which are all parameters: leave it empty.")


# What is trained of a model whose other parameters are frozen.
Tuned: TypeAlias = AdapterConfig | Groups


def check_names(names: tuple[str, ...]) -> None:
  """Raises ValueError if a name is no group, or if groups overlap."""
  tables = [name.partition(".")[0] for name in names]
  matches = [GROUP.fullmatch(name) for name in names]
  wrong = any(match is None or (match[1] and int(match[1]) > int(match[2])) for match in matches)
  if wrong or len({*tables}) < len(tables):
    raise ValueError(
      f"only is {names}; it may name embed or embed.image, head or head.image, and layers or "
      "layers.N-M with N <= M, each once."
    )
