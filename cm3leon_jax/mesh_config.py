"""Defines the section of the config about the device mesh. Imports no JAX."""

from collections.abc import Sequence
import math
from typing import Annotated

from pydantic import Field
import pydantic.dataclasses

from cm3leon_jax.config import STRICT

AXES = ("data", "fsdp", "fsdp_inner", "tensor")


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class MeshConfig:
  """Shape of the device mesh. One axis may be -1, which means the remaining devices."""

  data: Annotated[int, Field(ge=-1)] = 1
  """Number of replicas of the parameters. Gradients are summed over this axis, which is the only
  axis that spans slices, because the network between slices is slow."""
  fsdp: Annotated[int, Field(ge=-1)] = -1
  """Number of devices over which parameters, optimizer state and batch are sharded."""
  tensor: Annotated[int, Field(ge=-1)] = 1
  """Number of devices over which heads, feed-forward and vocabulary are sharded."""
  fsdp_inner: Annotated[int, Field(ge=-1)] = 1
  """Size of a second fsdp axis. On a pod, `fsdp` and `fsdp_inner` should each span one dimension of
  the torus (16 and 16 on v5e-256), because XLA:TPU then reduce-scatters the gradients. Over an axis
  that spans two dimensions, it uses all-reduce instead, which doubles the traffic."""

  def __post_init__(self) -> None:
    if 0 in self.shape or self.shape.count(-1) > 1:
      raise ValueError(
        f"{_shown(self.shape)}; each must be positive, except that one may be -1 (the remaining "
        "devices)."
      )

  @property
  def shape(self) -> tuple[int, ...]:
    """Sizes of the axes, in the order of `AXES`."""
    return tuple(getattr(self, axis) for axis in AXES)

  def over(self, devices: int) -> dict[str, int]:
    """Returns the size of each axis for a number of devices.

      MeshConfig(fsdp=-1, tensor=4).over(256)
      {"data": 1, "fsdp": 64, "fsdp_inner": 1, "tensor": 4}

    Raises:
      ValueError: the product of the sizes is not the number of devices.
    """
    shape = list(self.shape)
    known = math.prod(n for n in shape if n != -1)
    if -1 in shape and devices % known == 0:
      shape[shape.index(-1)] = devices // known
    elif -1 in shape:
      raise ValueError(
        f"{_shown(shape)}; -1 means the remaining devices, so the product of the other axes, "
        f"{known}, must divide the number of devices, {devices}."
      )
    elif known != devices:
      raise ValueError(
        f"{_shown(shape)}; the product is {known}, but must be {devices}, the number of devices; "
        "an axis of -1 takes the remaining devices."
      )
    return dict(zip(AXES, shape, strict=True))


def _shown(shape: Sequence[int]) -> str:
  return f"mesh ({', '.join(AXES)}) = {tuple(shape)}"
