"""Copies the tokenizers and CLIP of a trained run into the workdir of a run that tunes it.

  cm3leon copy_tokenizers --config=examples/scenes/instruct.py \\
    --workdir=workdir/scenes_instruct --init_from=scenes

This is the first command of instruction tuning, because the trained decoder depends on the ids of
these tokenizers.
"""

from __future__ import annotations

from etils import epath, epy

from cm3leon_jax.commands import common, shared_flags
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.errors import UserError

with epy.lazy_imports():
  from cm3leon_jax.run import copies, run


def main(settings: Settings, workdir: epath.Path, flags: shared_flags.InitFrom) -> None:
  if not flags.init_from:
    raise UserError(
      "name the trained run whose tokenizers are copied: --init_from=workdir/scenes, or "
      "--init_from=scenes for the installed model."
    )
  own_images, of_parent = flags.own_image_tokenizer, common.parent_fields(**vars(flags))
  if of_parent and not own_images and not of_parent["data.base_documents"]:
    what = "has no documents that the run could replay, or measure what it forgets with"
    print(f"copy_tokenizers: warning: {flags.init_from} {what}.")
  made = copies.copy_tokenizers(run.Run(workdir, settings), flags.init_from, of_parent, own_images)
  shown = ", ".join(f"{name} {state}" for name, state in made.items())
  print(f"copy_tokenizers: {shown}, from {flags.init_from}.")


if __name__ == "__main__":
  common.run(main, shared_flags.InitFrom, prepares=True, starts=True)
