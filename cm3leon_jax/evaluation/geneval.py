"""Writes images in the folder layout that the scripts of GenEval and GenEval 2 read.

GenEval (Ghosh et al. 2023, github.com/djghosh13/geneval): evaluate_images.py reads
NNNNN/metadata.jsonl and NNNNN/samples/*.png for every prompt. GenEval 2 (Kamath et al. 2025,
github.com/facebookresearch/GenEval2): evaluation.py reads a JSON file that maps each prompt to the
path of one image (flag `--image_filepath_data`).
"""

from collections.abc import Sequence
import json

from etils import epath

from cm3leon_jax.config.settings import Settings
from cm3leon_jax.data.sources.lines import json_lines
from cm3leon_jax.data.sources.records import Rejected
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.atomic import open_filesystem, replacing
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.generation.image_tasks import TextToImage
from cm3leon_jax.generation.pipeline import Pipeline, check_tasks
from cm3leon_jax.generation.sample import Sample
from cm3leon_jax.generation.tasks import Task
from cm3leon_jax.generation.writer import save_png

IMAGE_PATHS = "image_paths.json"


def read_prompts(path: epath.PathLike) -> list[dict]:
  """Reads GenEval's evaluation_metadata.jsonl, or GenEval 2's geneval2_data.jsonl.

  Each line is a JSON object with a field `prompt`. Empty lines are skipped. Returns the objects
  with all their fields.

  Raises:
    UserError: the file is absent or empty, or a line is invalid. The message names the line.
  """
  path = epath.Path(path)
  if not path.exists():
    raise UserError(
      f"--prompts names {path}, which does not exist: give GenEval's evaluation_metadata.jsonl, or "
      "a file in the same format."
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
    raise UserError(f"--prompts names {path}, which is empty: give one JSON object per line.")
  return prompts


def metadata_of(prompt: str, facts: dict) -> dict:
  """Returns the line of a held-out caption in GenEval's evaluation_metadata.jsonl."""
  fields = {name: facts[name] for name in ("tag", "include", "exclude") if name in facts}
  return {**fields, "prompt": prompt}


def prompt_tasks(prompts: Sequence[dict], settings: Settings, where: str) -> list[TextToImage]:
  """Makes a text-to-image task for each prompt of `read_prompts`.

  Each task retrieves `evaluation.neighbors` documents. Prompt i uses the seed
  `settings.seed` + i. Messages use `where` as the name of the prompt file.
  """
  return [
    TextToImage(
      prompt=line["prompt"],
      retrieve=settings.evaluation.neighbors,
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
  """Generates samples and writes them in the folder layout of GenEval.

    00000/metadata.jsonl        what GenEval checks in images of the first prompt
    00000/samples/0000.png      first sample of the first prompt
    image_paths.json            {prompt: file of its first sample}, for GenEval 2

  The field `row` of a task is the number of its folder. `metadata` has one object per task.
  `num_samples` samples are generated for each task. Images are written batch by batch.

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
