"""The flag --skip_memory_check of commands that check whether a step fits its devices."""

from absl import flags

SKIP_MEMORY_CHECK = flags.DEFINE_bool(
  "skip_memory_check", False, "Start even if a step seems to need more memory than a device has."
)
