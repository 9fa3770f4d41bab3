"""Defines --records for the commands that grade instructions."""

from absl import flags

RECORDS = flags.DEFINE_integer("records", 100, "Held-out records per task.", lower_bound=2)
