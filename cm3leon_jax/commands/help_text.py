"""Formats the text of --help: the command's docstring with examples, and its flags by topic."""

import sys
import textwrap

from absl import flags

REQUESTS = {"--help", "-help", "-h", "--helpshort", "--helpfull", "-?"}
WIDTH = 100
PROCESSES = (
  "distributed",
  "coordinator_address",
  "num_processes",
  "process_id",
  "coordinator_timeout",
)
FIELDS = """\
  --config.SECTION.FIELD=VALUE
      Set a field of the config, e.g. --config.train.steps=100. Give it after --config."""


def _flag(flag: flags.Flag) -> str:
  name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}=VALUE"
  default = (flag.default_as_str or "").strip("'")
  shown = default not in ("", "None", "false")
  text = f"{flag.help} (default: {default})" if shown else flag.help
  indent = " " * 6
  return f"  {name}\n" + textwrap.fill(
    " ".join(text.split()), WIDTH, initial_indent=indent, subsequent_indent=indent
  )


def page(docstring: str, workdir: bool, several_processes: bool, config: bool = True) -> str:
  """Returns the text of --help."""
  modules = flags.FLAGS.flags_by_module_dict()

  def flags_of(module: str) -> list[flags.Flag]:
    return modules.get(f"cm3leon_jax.commands.{module}", [])

  common = flags_of("common")
  processes = [flag for flag in common if flag.name in PROCESSES]
  absent = set() if workdir else {"workdir"}
  absent |= set() if config else {"config", "print_config"}
  run = [flag for flag in common if flag not in processes and flag.name not in absent]
  groups = {
    "Flags of this command": modules.get(sys.argv[0], []),
    "Start": flags_of("init_from_flag") + flags_of("run_start"),
    "Reconstructions": flags_of("tokenizer_check"),
    "Grades": flags_of("grade_instructions"),
    "Prompts": flags_of("prompt_flags"),
    "Protocols": flags_of("protocol_flags"),
    "Files": flags_of("file_flags"),
    "Retrieval": flags_of("retrieve_flag"),
    "The run": run,
    "Processing of shards": flags_of("sharded"),
    "Jobs of several processes": processes if several_processes else [],
  }
  parts = [docstring.strip()]
  for title, members in groups.items():
    if members:
      lines = [_flag(flag) for flag in members] + [FIELDS] * (title == "The run" and config)
      parts.append("\n".join([f"{title}:", *lines]))
  return "\n\n".join(parts)
