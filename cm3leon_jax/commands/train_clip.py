"""Trains CLIP on the training pairs; CLIP finds neighbors and scores samples.

  cm3leon train_clip --config=examples/scenes/config.py --workdir=workdir/scenes

At SIGTERM and Ctrl-C the training saves and stops. The same command continues it.
"""

from __future__ import annotations

from etils import epath, epy

from cm3leon_jax.commands import common
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.stages import stages

with epy.lazy_imports():
  from cm3leon_jax.tokenizers import text
  from cm3leon_jax.training.image_models import clip_training as train_clip
  from cm3leon_jax.training.image_models import trainer


def main(settings: Settings, workdir: epath.Path) -> None:
  if stages.is_given(workdir, "clip"):
    return
  with common.use_mesh(settings), stages.stage(workdir, "clip", settings) as summary:
    if summary is not None:
      encode = text.TextTokenizer(workdir / "text_tokenizer", settings.vocab).encode
      text_size = settings.vocab.text_size
      summary.update(
        train_clip.train_clip(
          settings.clip,
          encode,
          text_size,
          workdir / "raw",
          workdir / "clip",
          settings.seed,
          stages.inputs(settings, workdir, "clip"),
        )
      )
    else:
      trainer.print_other_steps("clip", workdir / "clip", settings.clip.steps)
  trainer.delete_checkpoints(workdir / "clip")


if __name__ == "__main__":
  common.run(main, saves=True)
