"""Defines --allow_outside for the commands that read user files which name images."""

from absl import flags

ALLOW_OUTSIDE = flags.DEFINE_bool(
  "allow_outside",
  False,
  "Whether lines may name URLs, or images outside the folder of their file. Set it only for files "
  "that you trust, since a line can name any file on this machine.",
  allow_override=True,  # Other commands define this flag, and tests import them in one process.
)
