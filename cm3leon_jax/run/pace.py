"""Decides how many steps of the decoder fit into `train.minutes`, from a measured step.

`cm3leon run` measures steps of the real training before the stage `train` and stores the decision
in pace.json, so that the same command continues a stopped run with the same number of steps.
"""

import dataclasses

from etils import epath

from cm3leon_jax.config.build import build
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.stages.from_data import LEAST_STEPS, MOST_STEPS

FILE = "pace.json"
LEAST, MOST = LEAST_STEPS["train"], MOST_STEPS["train"]
# Time of everything but the steps, from the stage `train` on. Measured on the demo (docs/log.md).
START_SECONDS = 90.0  # Starts of processes and compilation, whatever a step takes.
HELDOUT_STEPS = 54  # Held-out losses and the evaluation take as long as so many steps.
CODE_TOKENS = 8  # An image code that is sampled takes as long as so many tokens of a step.
SAMPLES = 64  # Images that the stage `samples` draws.


@dataclasses.dataclass(frozen=True)
class Pace:
  """Number of steps that fit into the minutes of a run.

  Attributes:
    minutes: `train.minutes` of the run.
    seconds_before: time of the stages before `train`.
    step_seconds: measured time of a step.
    steps_after: steps that would take as long as the samples and the evaluation, see `after`.
    steps: the number of steps, from `LEAST` to `MOST`.
  """

  minutes: float
  seconds_before: float
  step_seconds: float
  steps_after: int
  steps: int

  @classmethod
  def of(
    cls, minutes: float, seconds_before: float, step_seconds: float, steps_after: int
  ) -> "Pace":
    """Computes the steps: Pace.of(15.0, 300.0, 0.25, 380).steps = (900 - 300 - 90) / 0.25 - 380."""
    left = 60 * minutes - seconds_before - START_SECONDS
    steps = min(max(LEAST, int(left / step_seconds) - steps_after), MOST)
    return cls(minutes, seconds_before, step_seconds, steps_after, steps)

  @property
  def seconds_left(self) -> float:
    """Expected seconds from the first step to the end of the run."""
    return START_SECONDS + (self.steps + self.steps_after) * self.step_seconds

  def describe(self, clock: str) -> str:
    """Formats the decision. `clock` is the time of day at which the run is expected to end."""
    total = self.seconds_before + self.seconds_left
    fits = f"{self.steps:,} steps fit into {self.minutes:g} minutes"
    if int(total) > 60 * self.minutes:
      fits = f"{self.minutes:g} minutes are too few, so it takes the least, {self.steps} steps"
    return (
      f"a step takes {self.step_seconds:.3g} s on this machine; {fits}. "
      f"The whole run takes about {total / 60:.0f} minutes; it ends at about {clock}."
    )


def after(settings: Settings) -> int:
  """Returns the number of steps that take as long as a run's held-out losses and images."""
  config = settings.evaluation
  judged = config.captions * len(config.guidance) if config.judge else 0
  tokens = settings.train.global_batch_size * settings.data.sequence_length
  codes = (SAMPLES + judged) * settings.vqgan.image_tokens
  return HELDOUT_STEPS + round(CODE_TOKENS * codes / tokens)


def read(workdir: epath.Path) -> Pace | None:
  """Returns the stored decision of a run, or None."""
  path = workdir / FILE
  return build(Pace, read_json(path), FILE) if path.exists() else None


def write(workdir: epath.Path, pace: Pace) -> None:
  """Stores the decision of a run."""
  write_json(workdir / FILE, dataclasses.asdict(pace))
