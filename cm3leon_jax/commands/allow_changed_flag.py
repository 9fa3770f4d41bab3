"""Defines --allow_changed of the commands that continue a run."""

from absl import flags

ALLOW_CHANGED = flags.DEFINE_list(
  "allow_changed",
  [],
  "Fields that may differ from those that the run began with, e.g. optimizer.learning_rate. What "
  "follows is printed, and train/config.json lists the changes.",
)
