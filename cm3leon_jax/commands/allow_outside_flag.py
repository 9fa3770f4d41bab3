"""Flag of the commands that read files of yours which name images."""

from absl import flags

ALLOW_OUTSIDE = flags.DEFINE_bool(
  "allow_outside",
  False,
  "Whether lines may name images outside of the folder of their file, or URLs. Only for files that "
  "you trust: they could name any file of the machine.",
  allow_override=True,  # Of other commands, which tests import in one process.
)
