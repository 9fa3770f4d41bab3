"""Shows what each retrieved document made more likely in an image, or changes without documents.

  cm3leon explain --workdir=scenes --prompt="a red bell" --retrieve=2
  cm3leon explain --workdir=scenes --prompt="a red bell" --samples=4 --without=KEY

The command draws the samples that `cm3leon generate` draws with the same flags. For each sample
and each of its documents, it writes a heat map of the codes that the document made more likely,
and prints the origin of the document. With --without, it draws without these documents, and prints
which samples the documents change. docs/generating.md has an example.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Any

from etils import epath, epy

from cm3leon_jax.commands import common, drawing, flag
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.errors import UserError

with epy.lazy_imports():
  from cm3leon_jax.generation import document_effects, explanation, retrieved
  from cm3leon_jax.generation import pipeline as pipeline_lib
  from cm3leon_jax.generation import writer as writer_lib
  from cm3leon_jax.retrieval import removed
  from cm3leon_jax.run import run


@dataclasses.dataclass(frozen=True)
class Flags(drawing.Flags):
  without: flag.Several = ()
  """Key of a document not to retrieve; the command prints which samples change."""

  def check(self) -> None:
    super().check()
    if not (self.prompt or self.prompts):
      raise UserError('name what is drawn: --prompt="a red bell", or --prompts=my.jsonl')


def main(settings: Settings, workdir: epath.Path, flags: Flags) -> None:
  seed = settings.seed if flags.seed is None else flags.seed
  trained = run.Run.open(workdir, flags.applied(settings))
  tasks = drawing.asked_tasks(trained, flags, seed)
  source = retrieved.bank_of(trained, flags.bank)
  if not all(task.name == "text_to_image" for task in tasks) or not any(x.retrieve for x in tasks):
    raise UserError(explanation.REFUSED)
  if flags.without and source and source.bank:
    removed.rows(source.bank / "neighbors", flags.without)

  def after(
    pipeline: pipeline_lib.Pipeline, tasks: Sequence, writer: writer_lib.Writer, samples: Sequence
  ) -> dict[str, Any]:
    if not flags.without:
      document_effects.explain(writer, samples)
      return {}
    return {"changed": document_effects.compare(pipeline, flags.without, tasks, samples)}

  identity: dict = {"without": list(flags.without)} if flags.without else {"explain": True}
  drawing.draw(trained, flags, tasks, source, identity, after=after, command="explain")


if __name__ == "__main__":
  common.run(main, Flags, config=None)
