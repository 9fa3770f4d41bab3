"""Defines --allow_changed for the commands that continue a run."""

from absl import flags

ALLOW_CHANGED = flags.DEFINE_list(
  "allow_changed",
  [],
  "Config fields whose values may differ from the values at the start of the run, e.g. "
  "optimizer.learning_rate. The command prints the consequences, and train/config.json lists the "
  "changes.",
)
