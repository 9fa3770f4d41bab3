"""Writes images in the folders that the scripts of GenEval and GenEval 2 read.

GenEval (Ghosh et al. 2023, github.com/djghosh13/geneval): evaluate_images.py reads
NNNNN/metadata.jsonl and NNNNN/samples/*.png of every prompt. GenEval 2 (Kamath et al. 2025,
github.com/facebookresearch/GenEval2): evaluation.py reads a JSON object of one image for each
prompt, `--image_filepath_data`.
"""

from collections.abc import Sequence
import json

from etils import epath

from cm3leon_jax.config import UserError
from cm3leon_jax.data.sources.lines import json_lines
from cm3leon_jax.data.sources.records import Rejected
from cm3leon_jax.files.atomic import open_filesystem, replacing
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.generation.image_tasks import TextToImage
from cm3leon_jax.generation.pipeline import Pipeline, check_tasks
from cm3leon_jax.generation.sample import Sample
from cm3leon_jax.generation.tasks import Task
from cm3leon_jax.generation.writer import save_png
from cm3leon_jax.settings import Settings

IMAGE_PATHS = "image_paths.json"


def read_prompts(path: epath.PathLike) -> list[dict]:
  """Reads GenEval's evaluation_metadata.jsonl, or GenEval 2's geneval2_data.jsonl.

  Args:
    path: of a file with a JSON object in each line, with a `prompt`; empty lines are ignored.

  Returns:
    The objects, with all their fields.

  Raises:
    UserError: naming file and line.
  """
  path = epath.Path(path)
  if not path.exists():
    raise UserError(
      f"--prompts names {path}, which does not exist: give GenEval's evaluation_metadata.jsonl, or "
      "a file like it."
    )
  prompts = []
  for where, fields in json_lines(*open_filesystem(path), []):
    if isinstance(fields, Rejected):
      raise UserError(fields.message)
    prompt = fields.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
      raise UserError(f"{where} must be a JSON object with a text in its field 'prompt'.")
    prompts.append(fields)
  if not prompts:
    raise UserError(f"--prompts names {path}, which has no line: give one JSON object per line.")
  return prompts


def prompt_tasks(prompts: Sequence[dict], settings: Settings, where: str) -> list[TextToImage]:
  """Returns the task of each prompt: `sampling`, `evaluation.scene_neighbors` and seed of the run.

  Args:
    prompts: result of `read_prompts`.
    settings: of the run; each next prompt adds 1 to its seed.
    where: name of the file, for messages.
  """
  return [
    TextToImage(
      prompt=line["prompt"],
      retrieve=settings.evaluation.scene_neighbors,
      seed=settings.seed + row,
      sampling=settings.sampling,
      row=row,
      where=f"{where}, prompt {row + 1}",
    )
    for row, line in enumerate(prompts)
  ]


def export(
  pipeline: Pipeline,
  folder: epath.PathLike,
  tasks: Sequence[Task],
  metadata: Sequence[dict],
  num_samples: int,
) -> None:
  """Generates samples, and writes the folder of an export.

    00000/metadata.jsonl        what GenEval checks of the first prompt
    00000/samples/0000.png      its first sample
    image_paths.json            {prompt: file of its first sample}, for GenEval 2

  Args:
    pipeline: of the run.
    folder: gets the files; images are written batch by batch.
    tasks: one for each prompt, numbered by `row`.
    metadata: one object for each prompt.
    num_samples: of each prompt.

  Raises:
    UserError: a prompt is too long, or the bank is empty.
  """
  folder = epath.Path(folder)
  check_tasks(pipeline.layout, tasks, pipeline.bank)

  def save(samples: Sequence[Sample]) -> None:
    for sample in samples:
      save_png(_sample_path(folder, sample.task, sample.index), sample.segments[0])

  pipeline.generate(tasks, num_samples, given={}, on_batch=save, show_progress=True)
  for task, fields in zip(tasks, metadata):
    with replacing(folder / f"{task.row:05d}" / "metadata.jsonl", "w") as file:
      file.write(json.dumps(fields) + "\n")
  paths = {task.prompt: str(_sample_path(folder, task, 0)) for task in tasks}
  write_json(folder / IMAGE_PATHS, paths)


def _sample_path(folder: epath.Path, task: Task, index: int) -> epath.Path:
  return folder / f"{task.row:05d}" / "samples" / f"{index:04d}.png"
