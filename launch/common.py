"""What every command shares: the --config and --workdir flags, the checked settings, and how a user's mistake is told."""

import sys

from absl import app, flags
from etils import epath
from ml_collections import config_flags

from cm3leon_jax.config import UserError
from cm3leon_jax.settings import settings_from_config

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file, e.g. ml_configs/openmoji.py; fields: --config.train.steps=100."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, local or gs://; every stage has a folder of its own in it.")
flags.mark_flags_as_required(["config", "workdir"])


def _fail(error: Exception) -> None:
  """One line on stderr, exit code 2."""
  print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
  sys.exit(2)


def _parse_flags(argv: list[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except (flags.Error, UserError, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
    _fail(error)


def run(main) -> None:
  """Runs `main(settings, workdir)` as an absl app; a UserError becomes one sentence on stderr and exit code 2."""

  def checked(argv):
    try:
      if len(argv) > 1:
        raise UserError(f"unexpected argument '{argv[1]}': commands take flags only (--name=value).")
      main(settings_from_config(_CONFIG.value), epath.Path(_WORKDIR.value))
    except UserError as error:
      _fail(error)

  app.run(checked, flags_parser=_parse_flags)
