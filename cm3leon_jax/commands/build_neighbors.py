"""Embeds the pairs with CLIP, and finds and writes the neighbors of every pair.

  cm3leon build_neighbors --config=examples/scenes/config.py --workdir=workdir/scenes
  cm3leon build_neighbors --config=examples/scenes/config.py --workdir=workdir/scenes \\
    --runner=ray --ray_address=auto --ray_workers=64
"""

from __future__ import annotations

import functools

from etils import epath, epy

from cm3leon_jax.commands import common, sharded, shared_flags
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.stages import stages, table

with epy.lazy_imports():
  from cm3leon_jax.retrieval import bank, neighbors


def main(settings: Settings, workdir: epath.Path, flags: shared_flags.Runner) -> None:
  with sharded.stage(workdir, "neighbors", settings) as summary:
    if summary is not None:
      load_clip = functools.partial(
        bank.load_clip, settings.retrieval.clip, str(workdir), settings.vocab
      )
      job = bank.EmbedJob(
        str(workdir / "raw"),
        str(workdir / "neighbors"),
        load_clip,
        settings.retrieval.query_dropout,
        settings.seed,
        {},
      )
      width = bank.embedding_width(settings.retrieval.clip, workdir)
      own = stages.ids(settings, workdir, table.own_clip(settings))
      clip = {"clip": settings.retrieval.clip, **own}
      summary.update(
        neighbors.build_neighbors(settings.retrieval, job, width, clip, flags.of_shards())
      )


if __name__ == "__main__":
  common.run(main, shared_flags.Runner)
