"""Defines flags of train and reinforce."""

from absl import flags

ALLOW_CHANGED = flags.DEFINE_list(
  "allow_changed",
  [],
  "Config fields whose values may differ from the values at the start of the run, e.g. "
  "optimizer.learning_rate. The command prints the consequences, and train/config.json lists the "
  "changes.",
)
SKIP_MEMORY_CHECK = flags.DEFINE_bool(
  "skip_memory_check",
  False,
  "Start even if the estimate of a step's memory exceeds the memory of a device.",
)
