"""Defines --records of the commands that grade instructions."""

from absl import flags

RECORDS = flags.DEFINE_integer("records", 100, "Held-out records of each task.", lower_bound=2)
