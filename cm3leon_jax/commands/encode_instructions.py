"""Encodes the records of all instruction-tuning tasks as token ids.

  cm3leon encode_instructions --config=examples/scenes/instruct.py \\
    --workdir=workdir/scenes_instruct

`config.instructions` names the tasks, and docs/tuning.md describes them. The command lists
each invalid record with the reason in instructions/NAME/rejected.jsonl.
"""

from __future__ import annotations

from etils import epath, epy

from cm3leon_jax.commands import common, sharded, shared_flags
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.errors import UserError
from cm3leon_jax.stages import stages, table

with epy.lazy_imports():
  from cm3leon_jax.data.instructions import sources, task_files
  from cm3leon_jax.evaluation import copied_tokenizer


def main(settings: Settings, workdir: epath.Path, flags: shared_flags.Encoding) -> None:
  if not settings.instructions.any:
    raise UserError(
      "config.instructions names no tasks: set config.instructions.tasks to a YAML file or to one "
      f"of {', '.join(task_files.shipped())}."
    )
  tasks = task_files.load_tasks(settings.instructions)
  more = {"tasks": sources.digest_of(tasks, settings.instructions)}
  with sharded.stage(workdir, "instructions", settings, more) as summary:
    if summary is None:
      return
    copied_tokenizer.check_records(settings, workdir, tasks, flags.limits)
    job = sources.InstructionJob(
      str(workdir),
      tasks,
      settings.instructions,
      settings.vocab,
      settings.data.sequence_length,
      settings.raw.num_threads,
    )
    tokenizers = stages.ids(settings, workdir, table.TOKENIZERS)
    summary.update(sources.encode_tasks(job, tokenizers, flags.of_shards()))
    for name, numbers in summary.items():
      shown = ", ".join(f"{value:,} {field}" for field, value in numbers.items())
      print(f"encode_instructions {name}: {shown}")


if __name__ == "__main__":
  common.run(main, shared_flags.Encoding)
