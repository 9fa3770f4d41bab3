"""Copies the tokenizers and CLIP of a trained run into the workdir of a run that tunes it.

  cm3leon copy_tokenizers --config=examples/scenes/instruct.py \\
    --workdir=workdir/scenes_instruct --init_from=scenes

This is the first command of instruction tuning, because the trained decoder depends on the ids of
these tokenizers.
"""

from __future__ import annotations

from absl import flags
from etils import epath, epy

from cm3leon_jax.commands import common
from cm3leon_jax.commands.init_from_flag import INIT_FROM, OWN_IMAGE_TOKENIZER
from cm3leon_jax.config import UserError
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.run import from_data

with epy.lazy_imports():
  from cm3leon_jax.export import copies
  from cm3leon_jax.run import base_documents, run


def main(settings: Settings, workdir: epath.Path, follows: bool = False) -> None:
  """Copies the tokenizers. If `follows`, fields of --config are computed from the base."""
  if not INIT_FROM.value:
    raise UserError(
      "name the trained run whose tokenizers are copied: --init_from=workdir/scenes, or "
      "--init_from=scenes for the installed model."
    )
  own_images, of_base = OWN_IMAGE_TOKENIZER.value, None
  if follows:
    of_base = base_documents.fields(INIT_FROM.value, own_images)
    settings = common.completed(workdir, True, of_base)
  made = copies.copy_tokenizers(run.Run(workdir, settings), INIT_FROM.value, of_base, own_images)
  shown = ", ".join(f"{name} {state}" for name, state in made.items())
  print(f"copy_tokenizers: {shown}, from {INIT_FROM.value}.")


if __name__ == "__main__":
  common.run(
    lambda settings, workdir: main(settings, workdir, bool(from_data.missing(flags.FLAGS.config))),
    prepares=True,
  )
