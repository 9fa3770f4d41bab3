"""Runs a command: defines common flags, parses all flags, and reports errors in one sentence."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import signal
import sys
import threading
from typing import Any, NoReturn

from absl import app, flags, logging
from etils import epath, epy
import ml_collections
from ml_collections import config_flags

from cm3leon_jax import accelerators
from cm3leon_jax.commands import config_file, interrupts
from cm3leon_jax.config import own_functions
from cm3leon_jax.config.settings import Settings, describe, settings_from_config
from cm3leon_jax.errors import TryAgain, UserError, did_you_mean, printable
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
FOLDERS = ("workdir", "out", "output", "bundle")  # Flags that name a folder.


class _Parser(flags.ArgumentParser):
  """Parses --config for `config_flags`, which adds the flags --config.SECTION.FIELD."""

  def parse(self, argument: str) -> ml_collections.ConfigDict:
    config = config_file.load(argument)
    given = (re.match(r"--?config\.([\w.]+)", word) for word in sys.argv[1:])
    for name in filter(None, given):
      config_file.check_field(config, name[1])
    return config.lock()  # Locked: flags cannot add fields.

  def flag_type(self) -> str:
    return "config"


def _define_flags(workdir: bool | None, config: bool | None, several_processes: bool) -> None:
  """Defines the flags that several commands take; see `run` for the arguments."""
  if workdir is not False:
    flags.DEFINE_string("workdir", None, "Folder of the run; each stage writes to a subfolder.")
  if config is not False:
    config_flags.DEFINE_config_file(
      "config",
      None,
      f"Config: a Python file, e.g. path/own.py, or one of {', '.join(config_file.SHIPPED)}. A "
      "variant follows a colon: own:15. --config.SECTION.FIELD=VALUE, given after --config, "
      "sets a field, e.g. --config.train.steps=100.",
    )
    flags.FLAGS["config"].parser = _Parser()
    flags.DEFINE_bool(
      "print_config", False, "Print every field of the checked config, one per line, and exit."
    )
  if several_processes:
    flags.DEFINE_bool(
      "distributed", False, "Join the processes that the cluster (TPU pod, SLURM, ...) started."
    )
    flags.DEFINE_string(
      "coordinator_address", None, "host:port of process 0; for jobs without --distributed."
    )
    flags.DEFINE_integer("num_processes", None, "Number of processes of the job.")
    flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
    flags.DEFINE_integer(
      "coordinator_timeout", 300, "Seconds that the processes wait for each other.", lower_bound=1
    )


def _join_processes(saves: bool) -> None:
  """Joins the other processes of the job if flags request it.

  If `saves`, a SIGTERM or Ctrl-C must stop all processes at the same step.
  """
  given = flags.FLAGS
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


def _fail(message: str, code: int = UserError.exit_code) -> NoReturn:
  """Prints one line on stderr and exits."""
  print(f"error: {' '.join(printable(message).split())}", file=sys.stderr)
  sys.exit(code)


@contextlib.contextmanager
def _reporting() -> Iterator[None]:
  """Reports an expected error of the body in one sentence, and exits with its exit code."""
  try:
    yield
  except TryAgain as error:
    _fail(str(error), error.exit_code)
  except Exception as error:
    # Check this first, because a UserError may wrongly report an access error as a damaged file.
    if reason := buckets.failure(error):
      _fail(reason + _flags_of(reason), TryAgain.exit_code)
    if isinstance(error, UserError):
      _fail(str(error), error.exit_code)
    if isinstance(error, OSError) and (flag := _flag_of(error)):
      _fail(f"{flag} cannot be used ({error.strerror}): name another folder.")
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


def with_homes(arguments: Sequence[str]) -> list[str]:
  """Replaces `~` at the start of paths, because shells leave `--workdir=~/run` as it is.

  with_homes(["--workdir=~/run", "--prompt=~"]) = ["--workdir=/home/ada/run", "--prompt=~"]
  """
  found = [re.fullmatch(r"(--?(?!prompt=)[\w.]+=)(~.*)", one, re.DOTALL) for one in arguments]
  return [m[1] + os.path.expanduser(m[2]) if m else one for m, one in zip(found, arguments)]


def _help() -> str:
  """Returns the docstring of the command, with examples, and its flags."""
  modules = flags.FLAGS.flags_by_module_dict()
  own = [name for name in modules if name == sys.argv[0] or name.startswith("cm3leon_jax.")]
  parts = [sys.modules["__main__"].__doc__ or "", *map(flags.FLAGS.module_help, own)]
  return "\n".join(part.strip("\n") for part in parts)


def _mistake(error: Exception) -> str:
  """Returns what is wrong with a flag, from the error of its parser."""
  name = getattr(error, "flagname", "")
  if name.startswith("config.") and "config" in flags.FLAGS:
    own = name.rpartition(".")[2]
    instead = f"; or give --{own}, which needs no config" if own in flags.FLAGS else ""
    return f"--{name} has no config to change: give --config first{instead}"
  text = re.sub(r"invalid literal for int\(\).*", "it must be a whole number", str(error.args[0]))
  return re.sub(r"could not convert string to float.*", "it must be a number", text)


def _parse_flags(actions: Sequence[str], argv: Sequence[str]) -> list[str]:
  """Parses the flags, prints --help, and reports errors in one sentence.

  `actions` has the allowed values of the first argument; without them, no argument is allowed. If
  "" is one of them, the argument is optional.
  """
  if {"--help", "-h"}.intersection(argv):
    print(_help())
    sys.exit(0)
  try:
    program, *words = flags.FLAGS(with_homes(argv))
  # For a wrong field of the config, ml_collections raises AttributeError or KeyError.
  except (flags.Error, ValueError, AttributeError, KeyError) as error:
    if isinstance(error.__context__, UserError):  # absl adds the flag, which may not be the cause.
      _fail(str(error.__context__))
    _fail(f"{_mistake(error)} (--help lists the flags)")
  words = words or [""] * ("" in actions)
  if actions and (not words or words[0] not in actions):
    hint = did_you_mean("".join(words[:1]), actions, "give one of them.")
    _fail(f"the first argument must be one of {', '.join(filter(None, actions))}: {hint}")
  if surplus := words[1:] if actions else words:
    _fail(f"unexpected argument '{surplus[0]}': give --name=value, and quotes around spaces.")
  for name in FOLDERS:
    value = flags.FLAGS[name].value if name in flags.FLAGS else None
    if value and "://" not in value and os.path.isfile(value):
      _fail(f"--{name} is {value}, which is a file: name a folder.")
  return [program, *words]


def parent_of(base: str, init_from: str) -> str:
  """Returns the run that a run is tuned from; "": none, it starts from random parameters.

  `base` is config.train.base, and `init_from` is the value of --init_from.
  """
  return (init_from or base) if init_from != NONE else ""


def parent_fields() -> dict[str, Any] | None:
  """Returns the fields of the parent that the flags name; None if the config follows no parent."""
  given = flags.FLAGS
  init_from = given.init_from if "init_from" in given else ""
  source = parent_of(given.config.train.base, init_from)
  if not source or not from_data.missing(given.config):
    return None
  return base_documents.fields(source, "own_image_tokenizer" in given and given.own_image_tokenizer)


def _settings(optional: bool, prepares: bool, starts: bool = False) -> Settings:
  """Returns the settings of --config or, if --config is optional, of the model in --workdir.

  For --print_config, the fields that are not known yet have the values of the parent, if any.

  Raises:
    UserError: --config is missing, or --workdir has no trained model; see `completed`.
  """
  if flags.FLAGS.config is not None:
    workdir = flags.FLAGS.workdir if "workdir" in flags.FLAGS else None
    shows = flags.FLAGS.print_config
    begins = starts or (shows and not from_data.stored_of_base(workdir))
    return completed(workdir, prepares or shows, parent_fields() if begins else None)
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
  workdir: str | epath.Path | None, prepares: bool = False, of_base: dict[str, Any] | None = None
) -> Settings:
  """Returns the settings of --config. Some fields may be computed from the data in `workdir`.

  For `prepares` and `of_base`, see `from_data.complete`.

  Raises:
    UserError: the config is wrong, or some fields are computed from data that is not prepared.
  """
  given = list(config_flags.get_override_values(flags.FLAGS["config"]))
  config = from_data.complete(flags.FLAGS.config, workdir, prepares, of_base, given)
  own_functions.resolve(config)  # Flags name files relative to the current folder.
  return settings_from_config(config)


def config_arguments() -> list[str]:
  """Returns the flags --config and --config.SECTION.FIELD that were given."""
  flag = flags.FLAGS["config"]
  if flag.value is None:
    return []
  changed = config_flags.get_override_values(flag)
  name = config_flags.get_config_filename(flag)
  return [f"--config={name}", *(f"--config.{field}={value}" for field, value in changed.items())]


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
  workdir: bool | None = True,
  several_processes: bool = False,
  saves: bool = False,
  config: bool | None = True,
  actions: Sequence[str] = (),
  prepares: bool = False,
  starts: bool = False,
  check: Callable[[], None] = lambda: None,
) -> None:
  """Runs a command as an absl app. A UserError becomes one sentence on stderr and exit code 2.

  A GCS bucket or disk that fails is also reported in one sentence. The exit code then makes
  launchers start the command again.

  Args:
    main: called as `main(settings, workdir)`, or as `main(settings)` without a workdir.
    workdir: whether the command takes --workdir. None: the flag is optional, and the command does
      not open the folder.
    saves: whether the command has a loop that saves at SIGTERM and Ctrl-C. Before the loop, these
      signals end the command immediately.
    config: whether the command takes a config. If not, `main` gets no settings. None: --config is
      optional, and its default is the stored settings of the run or bundle in --workdir.
    actions: allowed values of the first argument, which is then the first argument of `main`.
    prepares: whether the command prepares the data, which some fields of the config need.
    starts: whether the command starts a whole run, from --init_from or config.train.base.
    check: checks flags before the slow imports.
  """

  def checked(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax logs every file that it writes.
    with _reporting():
      check()
      given: list = argv[1:]
      buckets.prepare_access()
      if config is not False:
        given.append(_settings(config is None, prepares, starts))
        if flags.FLAGS.print_config:
          print("\n".join(describe(given[-1])))
          return
      if workdir:
        given.append(_folder())
      if several_processes:
        _join_processes(saves)
      main(*given)

  for number in (signal.SIGTERM, signal.SIGINT) if saves else ():
    # Keep an ignored signal ignored: scripts ignore SIGINT in background jobs.
    if signal.getsignal(number) is not signal.SIG_IGN:
      signal.signal(number, interrupts.stop_early)
  accelerators.use_cpu_if_alone()
  _define_flags(workdir, config, several_processes)
  run_app(checked, functools.partial(_parse_flags, actions))
