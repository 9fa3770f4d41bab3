"""Runs a command: reads its settings, and reports errors in one sentence."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import os
import pathlib
import signal
import threading
from typing import Any

from absl import app, flags, logging
from etils import epath, epy
import ml_collections
from ml_collections import config_flags

from cm3leon_jax import accelerators
from cm3leon_jax.commands import command_line, flag, interrupts, shared_flags
from cm3leon_jax.commands.command_line import FOLDERS, fail
from cm3leon_jax.config import own_functions
from cm3leon_jax.config.settings import Settings, describe, settings_from_config
from cm3leon_jax.errors import TryAgain, UserError
from cm3leon_jax.files import buckets
from cm3leon_jax.files.atomic import FULL
from cm3leon_jax.mesh import MeshConfig, create_mesh
from cm3leon_jax.stages import from_data

with epy.lazy_imports():  # Flags are parsed before JAX is imported, which takes seconds.
  import jax

  from cm3leon_jax import distributed
  from cm3leon_jax.run import base_documents
  from cm3leon_jax.run import run as run_lib

NONE = "none"  # Value of --init_from that starts from random parameters.


def _join_processes(given: shared_flags.Processes, saves: bool) -> None:
  """Joins the other processes of the job if flags request it.

  If `saves`, a SIGTERM or Ctrl-C must stop all processes at the same step.
  """
  job = (given.coordinator_address, given.num_processes, given.process_id)
  if not given.distributed and job == (None, None, None):
    return
  distributed.initialize(*job, given.coordinator_timeout)
  if saves and distributed.are_several():
    distributed.stop_together()


def make_mesh(settings: Settings) -> "jax.sharding.Mesh":
  """Creates the mesh of the config.

  Raises:
    UserError: the mesh does not fit the devices, or this host of a pod runs without the others.
  """
  if jax.process_count() > 1 and not jax.distributed.is_initialized():
    raise UserError(
      f"this is one of the {jax.process_count()} hosts of a pod: cm3leon train, cm3leon evaluate "
      "--protocol and cm3leon score need --distributed; other commands run on a single host."
    )
  try:
    made = create_mesh(settings.mesh)
    settings.check_split(made.shape)
  except ValueError as error:
    raise UserError(f"config.mesh: {error}") from error
  return made


def use_mesh(settings: Settings) -> contextlib.AbstractContextManager:
  """Sets the mesh of the config (`jax.set_mesh`). Raises the errors of `make_mesh`."""
  return jax.set_mesh(make_mesh(settings))


def keep_compiled(workdir: epath.Path) -> None:
  """Caches compiled programs in the workdir, so that a resumed run does not compile again.

  JAX_COMPILATION_CACHE_DIR selects another folder. CPU programs are not cached, because they depend
  on the machine's instruction set.
  """
  if jax.default_backend() != "cpu" and not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", str(workdir / "compilation_cache"))


@contextlib.contextmanager
def _reporting() -> Iterator[None]:
  """Reports an expected error of the body in one sentence, and exits with its exit code."""
  try:
    yield
  except TryAgain as error:
    fail(str(error), error.exit_code)
  except Exception as error:
    # Check this first, because a UserError may wrongly report an access error as a damaged file.
    if reason := buckets.failure(error):
      fail(reason + _flags_of(reason), TryAgain.exit_code)
    if isinstance(error, UserError):
      fail(str(error), error.exit_code)
    if isinstance(error, OSError) and (flag := _flag_of(error)):
      fail(f"{flag} cannot be used ({error.strerror}): name another folder.")
    raise


def _flags_of(reason: str) -> str:
  """Returns the flags that name folders, if `reason` is a full disk without a path; else ""."""
  values = ((name, flags.FLAGS[name].value) for name in FOLDERS if name in flags.FLAGS)
  given = " ".join(f"--{name}={value}" for name, value in values if value)
  return f": {given}" if given and reason.endswith(tuple(map(os.strerror, FULL))) else ""


def _flag_of(error: OSError) -> str:
  """Returns "--out=/proc/x" if this folder, or a parent of it, caused the error; otherwise ""."""
  place = os.path.abspath(error.filename) if isinstance(error.filename, str) else ""
  for name in FOLDERS:
    value = flags.FLAGS[name].value if name in flags.FLAGS else None
    path = pathlib.Path(value or "").absolute()
    if value and place in map(str, (path, *path.parents)):
      return f"--{name}={value}"
  return ""


def parent_of(base: str, init_from: str) -> str:
  """Returns the run that a run is tuned from; "": none, it starts from random parameters.

  `base` is config.train.base, and `init_from` is the value of --init_from.
  """
  return (init_from or base) if init_from != NONE else ""


def given_config() -> ml_collections.ConfigDict | None:
  """Returns the value of --config; None: it is not given, or the command does not take it."""
  return flags.FLAGS["config"].value if "config" in flags.FLAGS else None


def changed_fields() -> dict[str, Any]:
  """Returns the fields of the config that the flags --config.SECTION.FIELD set."""
  return {} if given_config() is None else config_flags.get_override_values(flags.FLAGS["config"])


def open_fields() -> list[str]:
  """Returns the fields that --config leaves open; they are computed from the data."""
  config = given_config()
  return [] if config is None else from_data.missing(config)


def parent_fields(
  init_from: str = "", own_image_tokenizer: bool = False, **_: Any
) -> dict[str, Any] | None:
  """Returns the fields of the parent that the flags name; None if the config follows no parent."""
  config = given_config()
  source = "" if config is None else parent_of(config.train.base, init_from)
  return base_documents.fields(source, own_image_tokenizer) if source and open_fields() else None


def _settings(given: Any, optional: bool, prepares: bool, starts: bool) -> Settings:
  """Returns the settings of --config or, if --config is optional, of the model in --workdir.

  For --print_config, the fields that are not known yet have the values of the parent, if any.

  Raises:
    UserError: --config is missing, or --workdir has no trained model; see `completed`.
  """
  if given_config() is not None:
    workdir = flags.FLAGS.workdir if "workdir" in flags.FLAGS else None
    shows = flags.FLAGS.print_config
    begins = starts or (shows and not from_data.stored_of_parent(workdir))
    of_parent = parent_fields(**vars(given)) if begins and given is not None else None
    return completed(workdir, prepares or shows, of_parent)
  if not optional:
    raise UserError("name a config: --config=own")
  stored = run_lib.Run.open(_folder()).settings
  if stored.evaluation.judge:
    print(
      f"warning: the stored settings name the judge {stored.evaluation.judge}, which is not "
      "imported, so nothing is judged: give the run's --config.",
      flush=True,
    )
    evaluation = dataclasses.replace(stored.evaluation, judge="")
    stored = dataclasses.replace(stored, evaluation=evaluation)
  # The stored mesh may not fit this machine; the default mesh does.
  return dataclasses.replace(stored, mesh=MeshConfig())


def completed(
  workdir: str | epath.Path | None, prepares: bool = False, of_parent: dict[str, Any] | None = None
) -> Settings:
  """Returns the settings of --config. Some fields may be computed from the data in `workdir`.

  For `prepares` and `of_parent`, see `from_data.complete`.

  Raises:
    UserError: the config is wrong, or some fields are computed from data that is not prepared.
  """
  config = from_data.complete(
    flags.FLAGS.config, workdir, prepares, of_parent, list(changed_fields())
  )
  own_functions.resolve(config)  # Flags name files relative to the current folder.
  return settings_from_config(config)


def config_arguments() -> list[str]:
  """Returns the flags --config and --config.SECTION.FIELD that were given."""
  if given_config() is None:
    return []
  changed = [f"--config.{field}={value}" for field, value in changed_fields().items()]
  return [f"--config={config_flags.get_config_filename(flags.FLAGS['config'])}", *changed]


def _folder() -> epath.Path:
  """Returns the folder of --workdir. Raises UserError if the flag is missing."""
  if not flags.FLAGS.workdir:
    raise UserError("name the folder of the run: --workdir=workdir")
  return epath.Path(flags.FLAGS.workdir)


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
  cls: type | None = None,
  *,
  workdir: bool = True,
  saves: bool = False,
  config: bool | None = True,
  actions: Sequence[str] = (),
  prepares: bool = False,
  starts: bool = False,
) -> None:
  """Runs a command as an absl app. A UserError becomes one sentence on stderr and exit code 2.

  A GCS bucket or disk that fails is also reported in one sentence. The exit code then makes
  launchers start the command again.

  Args:
    main: called as `main(settings, workdir, flags)`, without arguments that the command lacks.
    cls: dataclass of the command's flags, see `flag`. Its method `check`, if it has one, checks
      them before the slow imports.
    workdir: whether the command takes --workdir.
    saves: whether the command has a loop that saves at SIGTERM and Ctrl-C. Before the loop, these
      signals end the command immediately.
    config: whether the command takes a config. If not, `main` gets no settings. None: --config is
      optional, and its default is the stored settings of the run or bundle in --workdir.
    actions: allowed values of the first argument, which is then the first argument of `main`.
    prepares: whether the command prepares the data, which some fields of the config need.
    starts: whether the command starts a whole run, from --init_from or config.train.base.
  """

  def checked(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax logs every file that it writes.
    with _reporting():
      values: Any = None if cls is None else flag.values(cls)
      if hasattr(values, "check"):
        values.check()
      given: list = argv[1:]
      buckets.prepare_access()
      if config is not False:
        given.append(_settings(values, config is None, prepares, starts))
        if flags.FLAGS.print_config:
          print("\n".join(describe(given[-1])))
          return
      if workdir:
        given.append(_folder())
      if cls is not None:
        given.append(values)
      if isinstance(values, shared_flags.Processes):
        _join_processes(values, saves)
      main(*given)

  for number in (signal.SIGTERM, signal.SIGINT) if saves else ():
    # Keep an ignored signal ignored: scripts ignore SIGINT in background jobs.
    if signal.getsignal(number) is not signal.SIG_IGN:
      signal.signal(number, interrupts.stop_early)
  accelerators.use_cpu_if_alone()
  command_line.define(cls, workdir, config is not False)
  run_app(checked, functools.partial(command_line.parse, actions))
