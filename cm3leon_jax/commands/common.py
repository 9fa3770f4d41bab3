"""Runs a command: parses its flags, checks its config, and reports errors in one sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import errno
import functools
import os
import re
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, NoReturn

from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from cm3leon_jax import accelerators
from cm3leon_jax.commands import arguments, bucket_paths, config_file, help_text, interrupts
from cm3leon_jax.config import TryAgain, UserError, causes, printable
from cm3leon_jax.files import buckets, disk_errors
from cm3leon_jax.runs import from_data
from cm3leon_jax.runs.table import STAGES

if TYPE_CHECKING:
  import jax

  from cm3leon_jax.settings import Settings

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  f"Config: a Python file, e.g. path/own.py, or one of {', '.join(config_file.SHIPPED)}. "
  "A variant follows a colon: scenes:15.",
)
_PARSER = config_file.Parser()
flags.FLAGS["config"].parser = _PARSER
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run; each stage writes to a subfolder."
)
_PRINT_CONFIG = flags.DEFINE_bool(
  "print_config", False, "Print every field of the checked config, one per line, and exit."
)

_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "Join the processes that the cluster (TPU pod, SLURM, ...) started."
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator_address", None, "host:port of process 0; for jobs without --distributed."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes of the job.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
_TIMEOUT = flags.DEFINE_integer(
  "coordinator_timeout", 300, "Seconds that the processes wait for each other.", lower_bound=1
)


# errno values of a full or failing disk. Other OSErrors may come from transformers, which raises
# OSError if it cannot load a model.
NOT_WRITTEN = (*disk_errors.FULL, errno.EIO)
NAME_A_CONFIG = "name a config: --config=scenes"


def _instead(stage: str) -> str:
  """Returns the end of an error message: what a pod uses instead of a stage for one host."""
  if not stage:
    return ""
  return f"; {STAGES[stage].command} trains on one host: on a pod use {STAGES[stage].instead}"


def _join_processes(several: bool, saves: bool, stage: str) -> None:
  """Joins the other processes of the job if flags request it.

  If `saves`, a SIGTERM or Ctrl-C must stop all processes at the same step. For `stage`, see `run`.

  Raises:
    UserError: the flags contradict each other, or the command runs only in one process.
  """
  explicit = (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID)
  given = [flag.name for flag in explicit if flag.value is not None]
  given += ["distributed"] * _DISTRIBUTED.value
  if not given:
    return
  if not several:
    raise UserError(
      f"--{given[0]} is given, but this command runs in one process; "
      "only cm3leon train, cm3leon evaluate --protocol and cm3leon score run in "
      f"several{_instead(stage)}."
    )
  if _DISTRIBUTED.value and len(given) > 1:
    raise UserError(
      f"--distributed and --{given[0]} are given: leave one of them out. With --distributed, the "
      "cluster provides the addresses and numbers of the processes."
    )
  from cm3leon_jax import distributed

  distributed.initialize(
    _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _TIMEOUT.value
  )
  if saves and distributed.are_several():
    distributed.stop_together()


def make_mesh(settings: Settings, stage: str = "") -> jax.sharding.Mesh:
  """Creates the mesh of the config. `stage` is for the error message, see `run`.

  Raises:
    UserError: the mesh does not fit the devices, or this host of a pod runs without the others.
  """
  import jax

  from cm3leon_jax.mesh import create_mesh

  if jax.process_count() > 1 and not jax.distributed.is_initialized():
    raise UserError(
      f"this is one of the {jax.process_count()} hosts of a pod: cm3leon train, cm3leon evaluate "
      "--protocol and cm3leon score need --distributed, and other commands need a single "
      f"host{_instead(stage)}."
    )
  try:
    mesh = create_mesh(settings.mesh)
    settings.check_split(mesh.shape)
  except ValueError as error:
    raise UserError(f"config.mesh: {error}") from error
  return mesh


def use_mesh(settings: Settings, stage: str = "") -> contextlib.AbstractContextManager:
  """Sets the mesh of the config (`jax.set_mesh`). Raises the errors of `make_mesh`."""
  import jax

  return jax.set_mesh(make_mesh(settings, stage))


def keep_compiled(workdir: epath.Path) -> None:
  """Caches compiled programs in the workdir, so that a resumed run does not compile again.

  JAX_COMPILATION_CACHE_DIR selects another folder. CPU programs are not cached, because they depend
  on the machine's instruction set.
  """
  import jax

  if jax.default_backend() != "cpu" and not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", str(workdir / "compilation_cache"))


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
  """Raises `TryAgain` if the body raises OSError because the disk is full or fails.

  `what` names the output in the message, such as "export". The message says that partial output is
  ignored.
  """
  try:
    yield
  except OSError as error:
    if error.errno not in NOT_WRITTEN:
      raise
    raise TryAgain(
      f"the {what} could not be written ({error}), and the partial {what} is ignored: free "
      "some disk space or fix the disk, and run the same command again."
    ) from error


def _fail(message: str, code: int = UserError.exit_code) -> NoReturn:
  """Prints one line on stderr and exits."""
  print(f"error: {' '.join(printable(message).split())}", file=sys.stderr)
  sys.exit(code)


def _parse_flags(
  workdir: bool | None,
  begins: bool,
  several_processes: bool,
  config: bool | None,
  actions: tuple[str, ...],
  argv: list[str],
) -> list[str]:
  """Parses the flags, prints --help, and reports errors in one sentence.

  The flags of the config are parsed last, because the config imports JAX, which takes seconds.
  """
  argv = arguments.with_homes(argv)
  if help_text.REQUESTS.intersection(argv[1:]):
    docstring = sys.modules["__main__"].__doc__ or ""
    print(help_text.page(docstring, workdir is not False, several_processes, config is not False))
    sys.exit(0)
  of_config, _ = arguments.split(argv[1:])
  with _reporting():
    if config is False:
      arguments.refuse_config(argv[1:])
    words = arguments.parse(argv, config is not False)
    arguments.check_words(words[1:], actions, argv[1:])
    arguments.check_fields(of_config)
    if of_config and not re.match(r"--?config(=|$)", of_config[0]):
      name = of_config[0].partition("=")[0]
      raise UserError(f"{name} is given, but no config before it: {NAME_A_CONFIG}")
    # If the config is missing, `_settings` reports that instead of a wrong --workdir.
    needs_config = config is True and not of_config
    if workdir and not needs_config and not _PRINT_CONFIG.value:
      arguments.check_workdir(os.fspath(_folder()), begins, config is not True)
    arguments.check_places()
    accelerators.check_platforms()
  try:
    return [*words, *flags.FLAGS([argv[0], *of_config])[1:]]
  except (AttributeError, KeyError):
    _fail(config_file.unknown_field(config_file.config_fields(_PARSER.config), of_config))
  except flags.Error as error:
    mistakes = [str(found) for found in causes(error) if isinstance(found, UserError)]
    _fail(mistakes[0] if mistakes else arguments.wrong_value(error))


def _settings(optional: bool, prepares: bool) -> Settings:
  """Returns the settings of --config or, if --config is optional, of the model in --workdir.

  Raises:
    UserError: --config is missing, or --workdir has no trained model; see `completed`.
  """
  if _CONFIG.value is None:
    if not optional:
      raise UserError(NAME_A_CONFIG)
    from cm3leon_jax.mesh import MeshConfig
    from cm3leon_jax.trained.run import Run

    stored = Run.open(_folder()).settings
    # The stored mesh may not fit this machine; the default mesh does.
    return dataclasses.replace(stored, mesh=MeshConfig())
  return completed(_WORKDIR.value, prepares)


def completed(
  workdir: str | epath.Path | None, prepares: bool = False, of_base: dict[str, Any] | None = None
) -> Settings:
  """Returns the settings of --config. Some fields may be computed from the data in `workdir`.

  For `prepares` and `of_base`, see `from_data.complete`.

  Raises:
    UserError: the config is wrong, or some fields are computed from data that is not prepared.
  """
  from cm3leon_jax.settings import settings_from_config

  given = arguments.given_fields(sys.argv[1:])
  return settings_from_config(from_data.complete(_CONFIG.value, workdir, prepares, of_base, given))


def _folder() -> epath.Path:
  """Returns the folder of --workdir. Raises UserError if the flag is missing."""
  if not _WORKDIR.value:
    raise UserError("name the folder of the run: --workdir=workdir")
  return epath.Path(_WORKDIR.value)


@contextlib.contextmanager
def _reporting() -> Iterator[None]:
  """Reports an expected error of the body in one sentence, and exits with its exit code."""
  try:
    yield
  except TryAgain as error:
    _fail(str(error), error.exit_code)
  except ImportError as error:
    if "gcsfs" not in str(error):
      raise
    _fail(f"a path of the config is in a GCS bucket, which {bucket_paths.NEEDS_GCSFS}")
  except Exception as error:
    # Check this first, because a UserError may wrongly report an access error as a damaged file.
    if reason := buckets.failure(error):
      if buckets.refuses(error):
        _fail(f"{bucket_paths.where()}: {reason}: grant it the permission, or use another account.")
      _fail(f"{bucket_paths.where()}: {reason}: the same command continues.", TryAgain.exit_code)
    if isinstance(error, RuntimeError) and "Unable to initialize backend" in str(error):
      _fail(f"JAX_PLATFORMS is {os.environ.get('JAX_PLATFORMS', '')}: {error}")
    if reason := disk_errors.failure(error):
      _fail(reason, TryAgain.exit_code)
    if not isinstance(error, UserError):
      raise
    _fail(str(error), error.exit_code)


def run_app(main: Callable[[list[str]], None], parse: Callable[[list[str]], list[str]]) -> None:
  """Runs an absl app. Reports Ctrl-C in one sentence, and does not wait for Orbax's threads."""
  try:
    app.run(main, flags_parser=parse)
  except KeyboardInterrupt:
    interrupts.end()
  except SystemExit as end:
    # If a save fails at its start, Orbax's threads wait ten minutes for signals that never arrive.
    if (
      isinstance(end.code, int)
      and end.code
      and any(type(t).__module__.startswith("orbax.") for t in threading.enumerate())
    ):
      interrupts.end(end.code, "")
    raise


def run(
  main: Callable[..., None],
  workdir: bool | None = True,
  several_processes: bool = False,
  saves: bool = False,
  config: bool | None = True,
  actions: tuple[str, ...] = (),
  begins: bool = False,
  stage: str = "",
  prepares: bool = False,
) -> None:
  """Runs a command as an absl app. A UserError becomes one sentence on stderr and exit code 2.

  An unreachable GCS bucket or disk is also reported in one sentence. The exit code then makes
  launchers start the command again, unless the account has no permission for the GCS bucket.

  Args:
    main: called as `main(settings, workdir)`, or as `main(settings)` without a workdir.
    workdir: whether the command takes --workdir. None: the flag is optional, and the command does
      not open the folder.
    saves: whether the command has a loop that saves at SIGTERM and Ctrl-C. Before the loop, these
      signals end the command immediately.
    config: whether the command takes a config. If not, `main` gets no settings. None: --config is
      optional, and its default is the stored settings of the run or bundle in --workdir.
    actions: allowed values of the first argument, which is then the first argument of `main`.
    begins: whether the folder of --workdir may be absent.
    stage: stage that trains on one host only. The error for several hosts says what to use instead.
    prepares: whether the command prepares the data, which some fields need. Implies `begins`.
  """

  def checked(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax logs every file that it writes.
    disk_errors.prepare_logging()
    with _reporting():
      arguments.check_words(argv[1:], actions, sys.argv[1:])
      given: list = argv[1:]
      if workdir is not None:
        bucket_paths.check()
      buckets.prepare_access()
      if config is not False:
        given.append(_settings(config is None, prepares))
        if _PRINT_CONFIG.value:
          from cm3leon_jax.settings import describe

          print("\n".join(describe(given[-1])))
          return
      if workdir:
        given.append(_folder())
      _join_processes(several_processes, saves, stage)
      main(*given)

  for number in (signal.SIGTERM, signal.SIGINT) if saves else ():
    # Keep an ignored signal ignored: scripts ignore SIGINT in background jobs.
    if signal.getsignal(number) is not signal.SIG_IGN:
      signal.signal(number, interrupts.stop_early)
  accelerators.use_cpu_if_alone()
  parse = functools.partial(
    _parse_flags, workdir, begins or prepares, several_processes, config, actions
  )
  run_app(checked, parse)
