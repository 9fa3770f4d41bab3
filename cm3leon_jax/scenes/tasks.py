"""Implements `data.instructions.records.DrawnTasks` for the tasks `scenes/TASK`."""

from collections.abc import Iterator
import dataclasses

from cm3leon_jax.data.instructions.records import Record
from cm3leon_jax.scenes.config import ScenesConfig


@dataclasses.dataclass(frozen=True)
class ScenesTasks:
  """Instruction tasks about the scenes of a config."""

  config: ScenesConfig

  def records(self, task: str, split: str, number: int) -> Iterator[Record]:
    """Yields the first `number` records of a task, see `instructions.record`."""
    from cm3leon_jax.scenes import instructions  # It draws images, which needs the extra `demo`.

    return instructions.records(self.config, task, split, number)

  def identity(self) -> dict:
    """Returns the section `scenes` without `train` and `bank`, which do not affect the tasks."""
    fields = dataclasses.asdict(self.config)
    return {name: value for name, value in fields.items() if name not in ("train", "bank")}
