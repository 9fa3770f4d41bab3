"""Generates images and texts for your prompts and images, or for held-out captions of a run.

  cm3leon generate --workdir=scenes --prompt="a red bell"
  cm3leon generate --workdir=scenes-instruct --task=caption --image=bell.png
  cm3leon generate --workdir=workdir/scenes --prompts=my.jsonl --samples=8 --rank
  cm3leon generate --config=examples/scenes/config.py --workdir=workdir/scenes \\
    --prompt="a green bell" --config.sampling.temperature=0.8

--workdir is the workdir of a run, the folder of a bundle, or the name of an installed bundle.
Without --config, the command uses the settings that are stored there. Results for prompts go to
prompts/NAME-HASH/, and results for held-out captions to samples/. Each folder contains a PNG file
for each image, contact_sheet.png and results.jsonl. The folders are in the workdir of a run, in the
current folder for a bundle, or in --out. docs/generating.md shows every task.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from etils import epath, epy
from pydantic import PositiveInt

from cm3leon_jax.commands import common, drawing, flag
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.errors import UserError

with epy.lazy_imports():
  from cm3leon_jax.generation import heldout as heldout_lib
  from cm3leon_jax.generation import pipeline as pipeline_lib
  from cm3leon_jax.generation import retrieved
  from cm3leon_jax.generation import tasks as tasks_lib
  from cm3leon_jax.run import run

MOST_CAPTIONS = 16  # Default of --captions; fewer if fewer pairs are held out.
# A literal, because the flags are checked before JAX is imported.
TASKS = {  # With the inputs that they need.
  "text_to_image": ("prompt",),
  "infill_image": ("image",),
  "edit": ("image", "prompt"),
  "instruct": ("prompt",),
  "unconditional": (),
  "caption": ("image",),
  "question": ("prompt", "image"),
  "infill_text": ("prompt",),
  "interleaved": (),
}


@dataclasses.dataclass(frozen=True)
class Flags(drawing.Flags):
  task: Annotated[str, flag.one_of(TASKS)] = "text_to_image"
  """What to do with a prompt or an image, e.g. caption or edit; docs/generating.md lists all
  tasks."""
  image: flag.Several = ()
  """Image file: one for each --prompt, or one for all prompts."""
  box: flag.Listed | None = None
  """Box of infill_image: left,top,right,bottom in pixels of the model's resolution."""
  length: int = 0
  """Largest number of tokens in a text (default: 64) or an interleaved document."""
  captions: PositiveInt | None = None
  """Number of held-out captions, if no prompt or image is given (default: 16, or all if fewer)."""
  rank: bool = False
  """Order the samples of each prompt by CLIP score, best first."""

  def check(self) -> None:
    super().check()
    if self.prompts is None and self.task != "text_to_image":
      for needed in TASKS[self.task]:
        if not getattr(self, needed):
          raise UserError(f"task {self.task} needs --{needed}, but it is not given.")


def main(settings: Settings, workdir: epath.Path, flags: Flags) -> None:
  seed = settings.seed if flags.seed is None else flags.seed
  trained = run.Run.open(workdir, flags.applied(settings))
  fields = {"image": flags.image, "box": flags.box, "length": flags.length}
  tasks = drawing.asked_tasks(trained, flags, seed, flags.task, **fields)
  identity: dict[str, Any] = {"rank": flags.rank}
  if tasks:
    drawing.draw(trained, flags, tasks, retrieved.bank_of(trained, flags.bank), identity)
    return
  if trained.kind == "bundle":
    raise UserError(
      f"{trained.folder.name} is a bundle, which has no held-out captions: give a prompt, "
      '--prompt="a red bell", or the workdir of a run in --workdir.'
    )
  usual = [1.0, trained.settings.sampling.guidance], [0, trained.settings.data.num_neighbors]
  columns, captions = flags.columns(trained.settings, *usual), flags.captions or MOST_CAPTIONS
  identity |= {
    "captions": captions,
    "seed": seed,
    "guidance": list(dict.fromkeys(sampling.guidance for _, sampling in columns)),
    "retrieve": list(dict.fromkeys(retrieve for retrieve, _ in columns)),
  }

  def make_tasks(layout: tasks_lib.PromptLayout, pipeline: pipeline_lib.Pipeline) -> list:
    chosen = (captions, seed, columns, flags.keep_neighbors, pipeline.image_tokenizer)
    return heldout_lib.heldout_tasks(layout, trained.folder, *chosen)

  drawing.draw(trained, flags, (), retrieved.bank_of(trained, flags.bank), identity, make_tasks)


if __name__ == "__main__":
  common.run(main, Flags, config=None)
