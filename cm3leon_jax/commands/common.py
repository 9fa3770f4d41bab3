"""What every command shares: the --config and --workdir flags, the checked settings, and how a user's mistake is told."""

import dataclasses
import re
import sys

from absl import app, flags, logging
from etils import epath
import jax
from ml_collections import config_flags

from cm3leon_jax import distributed, stages
from cm3leon_jax.config import UserError
from cm3leon_jax.io import read_json
from cm3leon_jax.mesh import create_mesh
from cm3leon_jax.settings import Settings, settings_from_config

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file, e.g. ml_configs/openmoji.py; fields: --config.train.steps=100."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run; every stage has a folder of its own in it."
)

_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "Join the processes that the cluster (TPU pod, SLURM, ...) started."
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator_address", None, "host:port of process 0, where there is no such cluster."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the job.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0 on.")
_TIMEOUT = flags.DEFINE_integer(
  "coordinator_timeout", 300, "Seconds that the processes wait for each other.", lower_bound=1
)


# How a run computes, not what: a continued run may change these.
EXECUTION = {"data": {"read_threads"}, "model": {"remat_policy", "attention", "loss_chunk"}}


def identity(settings: Settings, *sections: str) -> dict:
  """The fields of some sections that make a run the same run."""
  fields = lambda name: dataclasses.asdict(getattr(settings, name)).items()
  return {
    name: {k: v for k, v in fields(name) if k not in EXECUTION.get(name, ())} for name in sections
  }


def _join_processes(several: bool) -> None:
  """Joins the job's other processes if the flags say so. Raises UserError if they contradict each other, or the command."""
  explicit = (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID)
  given = [flag.name for flag in explicit if flag.value is not None] + [
    "distributed"
  ] * _DISTRIBUTED.value
  if not given:
    return
  if not several:
    raise UserError(
      f"--{given[0]} is given, but this command runs in one process; only launch.train runs in several."
    )
  if _DISTRIBUTED.value and len(given) > 1:
    raise UserError(
      f"--distributed and --{given[0]} are given: the cluster says who the processes are, or the flags do."
    )
  distributed.initialize(*(flag.value for flag in explicit), _TIMEOUT.value)


def use_mesh(settings: Settings):
  """`jax.set_mesh` of the config's mesh. Raises UserError if it does not fit the devices."""
  if jax.process_count() > 1 and not jax.distributed.is_initialized():
    raise UserError(
      f"this is one of a pod's {jax.process_count()} hosts: launch.train needs --distributed, others a single host."
    )
  try:
    return jax.set_mesh(create_mesh(settings.mesh))
  except ValueError as error:
    raise UserError(f"config.mesh: {error}") from error


def keep_compiled(workdir: epath.Path) -> None:
  """Compiled programs of an accelerator are kept in the workdir, so that a run that continues does not wait for the compiler.

  JAX_COMPILATION_CACHE_DIR names another folder. On CPUs nothing is kept: a program is made for one machine's instructions.
  """
  if jax.default_backend() != "cpu" and not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", str(workdir / "compilation_cache"))


def require_run(settings: Settings, workdir: epath.Path) -> str:
  """Id of the finished training in `workdir`. Raises UserError if it was another model's than the config's, or is not done."""
  found = stages.require(workdir / "train", "train")["id"]
  stored = read_json(workdir / "train" / "config.json")["run"]
  expected = identity(settings, "vocab", "model")
  stages.check_same_config(workdir / "train", {name: stored[name] for name in expected}, expected)
  return found


def clip_inputs(settings: Settings, workdir: epath.Path) -> dict[str, str]:
  """Ids of the stages that `bank.load_clip` reads, none for a Hugging Face CLIP. Raises UserError if one is not finished."""
  if settings.retrieval.clip:
    return {}
  folders = {"text_tokenizer": "train_text_tokenizer", "clip": "train_clip"}
  return {
    folder: stages.require(workdir / folder, command)["id"] for folder, command in folders.items()
  }


def _fail(message: str, code: int = UserError.exit_code) -> None:
  """One line on stderr, and out."""
  print(f"error: {' '.join(message.split())}", file=sys.stderr)
  sys.exit(code)


def _parse_flags(argv: list[str]) -> list[str]:
  """Parses the flags; what is wrong with a --config or one of its fields is told without the parser's own traceback."""
  try:
    return flags.FLAGS(argv)
  except (AttributeError, KeyError) as error:
    text = str(error.args[0]).replace("\\n", " ").replace("\\'", "'").strip("'")
    _fail(f"a --config.SECTION.FIELD flag names an unknown field: '{text}")
  except flags.Error as error:
    _fail(re.split(r"\w+Error: ", str(error))[-1])


def _config():
  try:
    list(_CONFIG.value)  # A file that could not be loaded is told at the first use.
  except OSError as error:
    reason = str(error).rpartition("[Relative path]:")[2]
    raise UserError(
      f"--config could not be loaded, name a Python file with a get_config function: {reason}"
    ) from error
  return _CONFIG.value


def run(main, workdir: bool = True, several_processes: bool = False) -> None:
  """Runs `main(settings, workdir)` as an absl app; a UserError becomes one sentence on stderr and exit code 2.

  Args:
    main: of the command.
    workdir: whether the command works in one; without, it is `main(settings)`.
    several_processes: whether it may be one of a job's several processes.
  """

  def checked(argv):
    logging.set_verbosity(logging.WARNING)  # Orbax tells every file that it writes.
    try:
      if len(argv) > 1:
        raise UserError(
          f"unexpected argument '{argv[1]}': commands take flags only (--name=value)."
        )
      settings = settings_from_config(_config())
      _join_processes(several_processes)
      main(settings, *([epath.Path(_WORKDIR.value)] if workdir else []))
    except UserError as error:
      _fail(str(error), error.exit_code)

  for module in filter(
    None, map(sys.modules.get, ("cm3leon_jax.commands.common", "cm3leon_jax.commands.sharded"))
  ):  # --help tells their flags, too.
    for flag in flags.FLAGS.get_key_flags_for_module(module):
      flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
  flags.mark_flags_as_required(["config", "workdir"] if workdir else ["config"])
  app.run(checked, flags_parser=_parse_flags)
