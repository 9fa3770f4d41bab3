"""Defines --skip_memory_check for the commands that check whether a step fits its devices."""

from absl import flags

SKIP_MEMORY_CHECK = flags.DEFINE_bool(
  "skip_memory_check",
  False,
  "Start even if the estimate of a step's memory exceeds the memory of a device.",
)
