"""Generates the samples of a protocol part by part, and reads them.

A part is a file with the samples of PART examples. Existing parts are not generated again, so a
killed command continues with the next part. Only one part is in memory, so a protocol can have any
number of examples. Images are stored as codes.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import json
import os
from typing import Any

from etils import epath
import numpy as np

from cm3leon_jax import distributed
from cm3leon_jax.config.sampling import SamplingConfig
from cm3leon_jax.data.documents.store import DocumentStore
from cm3leon_jax.data.published.examples import Example, caption_prompts, check_images, choose
from cm3leon_jax.data.published.files import open_examples
from cm3leon_jax.data.raw import reader
from cm3leon_jax.data.sources.image_folder import BY_FLAG, ImageFolder
from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation import judged
from cm3leon_jax.evaluation.protocols import protocol as protocol_lib
from cm3leon_jax.evaluation.protocols.protocol import Column, Protocol
from cm3leon_jax.files import digests
from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.files.json_files import read_json_lines
from cm3leon_jax.files.progress import progress_bar
from cm3leon_jax.generation.heldout import tasks_of_rows
from cm3leon_jax.generation.image_tasks import TextToImage
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.generation.sample import Sample
from cm3leon_jax.generation.tasks import Task
from cm3leon_jax.generation.text_tasks import InfillText

PART = 64  # Number of examples per part.


@dataclasses.dataclass(frozen=True)
class Evaluated:
  """Examples of a protocol.

  Attributes:
    rows: for each example, the index of its held-out document; None if examples come from files.
    facts: for each example, the facts that its caption states; {} if they are unknown.
  """

  examples: list[Example]
  rows: list[int] | None
  facts: list[dict]

  @property
  def images(self) -> dict[str, str]:
    """Maps the path of each real image to its group."""
    return {e.image: e.group for e in self.examples if e.image is not None}

  def fingerprint(self) -> str:
    """Returns the SHA-256 of the examples and of the bytes of their images."""
    contents = {path: digests.digest(path) for path in sorted(self.images)}
    fields = [dataclasses.asdict(example) for example in self.examples]
    return protocol_lib.digest([{**x, "image": contents.get(x["image"])} for x in fields])


def open_evaluated(
  protocol: Protocol,
  pipeline: Pipeline,
  workdir: epath.PathLike,
  data: epath.PathLike | None,
  allow_outside: bool = False,
) -> Evaluated:
  """Chooses the examples of a protocol by its seed.

  `data` is the folder of the evaluation files and their images, or None if the protocol uses
  held-out pairs, which are read from `workdir`. If `allow_outside` is True, the files may name
  images outside of `data`.

  Raises:
    UserError: a file is absent or wrong, an image does not exist or is not in `data`, there are too
      few examples, or the run's images do not have the resolution that the protocol requires.
  """
  side, wanted = pipeline.layout.resolution, protocol.data
  if protocol.resolution not in (0, side):
    raise UserError(
      f"the protocol needs images of {protocol.resolution} x {protocol.resolution} pixels, but "
      f"images of the run have {side} x {side}: measure another run, or set resolution to 0 in a "
      "copy of the protocol, whose distances cannot be compared with published distances."
    )
  if wanted.format == protocol_lib.HELDOUT:
    return _heldout(protocol, pipeline, epath.Path(workdir))
  if data is None:
    raise UserError(
      f"the protocol reads files of the format '{wanted.format}': set --data to their folder."
    )
  images = ImageFolder(os.fspath(data), BY_FLAG, allow_outside)
  read = open_examples(wanted.format, data, wanted.split, images)
  examples = list(caption_prompts(read) if protocol.task == "image" else read)
  chosen = choose(examples, _count(protocol, len(examples)), protocol.seed)
  check_images(chosen)
  return Evaluated(chosen, None, [{}] * len(chosen))


def _count(protocol: Protocol, available: int) -> int:
  """Returns the number of examples that a protocol uses. Raises UserError for too few examples."""
  if protocol.data.count > available:
    raise UserError(
      f"the protocol needs {protocol.data.count} examples, but there are {available} of the format "
      f"'{protocol.data.format}': set --examples={available}."
    )
  return protocol.data.count or available


def _heldout(protocol: Protocol, pipeline: Pipeline, workdir: epath.Path) -> Evaluated:
  """Chooses held-out pairs: with `judged.choose` if all have facts, otherwise evenly spaced."""
  store = DocumentStore(workdir / "documents" / "heldout_pairs", pipeline.layout.vocab)
  images = {pair.key: str(pair.image) for pair in reader.read_pairs(workdir / "raw", "heldout")}
  facts = [store[i].facts for i in range(len(store))]
  count = _count(protocol, len(store))
  if all(facts) and facts:
    rows = judged.choose(facts, count, protocol.seed)
  else:
    rows = np.linspace(0, len(store) - 1, count).astype(int).tolist()
  examples = []
  for document in (store[row] for row in rows):
    caption = pipeline.layout.decode(document.segments[0].tokens)
    group = document.concept or document.key
    examples.append(Example(document.key, group, images[document.key], caption, (caption,)))
  return Evaluated(examples, rows, [facts[row] for row in rows])


def tasks_of(
  protocol: Protocol, evaluated: Evaluated, pipeline: Pipeline, workdir: epath.PathLike
) -> dict[str, Sequence[Task]]:
  """Maps the name of each column to its tasks, one for each example."""
  result: dict[str, Sequence[Task]] = {}
  for column in protocol.columns:
    sampling = protocol_lib.sampling_of(column, pipeline.settings.sampling)
    if protocol.task == "image" and evaluated.rows is not None and not protocol.template:
      columns = [(column.retrieve, sampling)]  # Stored neighbors are used, so no search is needed.
      result[column.name] = tasks_of_rows(
        pipeline.layout, workdir, evaluated.rows, protocol.seed, columns
      )
    else:
      examples = enumerate(evaluated.examples)
      result[column.name] = [_task(protocol, column, sampling, i, one) for i, one in examples]
  return result


def _task(
  protocol: Protocol, column: Column, sampling: SamplingConfig, row: int, example: Example
) -> Task:
  common: dict[str, Any] = {
    "prompt": protocol.text_of(example),
    "retrieve": column.retrieve,
    "sampling": sampling,
    "seed": protocol.seed + row,
    "row": row,
    "where": f"example {example.key}",
  }
  if protocol.task == "image":
    return TextToImage(**common)
  assert example.image is not None
  return InfillText(image=example.image, length=column.length, **common)


def absent(paths: Iterable[epath.Path], title: str) -> Iterable[int]:
  """Returns the places of the files that the first process must write, with a progress bar."""
  places = [i for i, path in enumerate(paths) if not path.exists()]
  places = distributed.gather(places)[0]
  return progress_bar(places, desc=title, unit="part", disable=not distributed.is_first())


def generate(
  protocol: Protocol,
  evaluated: Evaluated,
  tasks: dict[str, Sequence[Task]],
  pipeline: Pipeline,
  folder: epath.Path,
) -> None:
  """Generates the missing parts of all columns. The first process writes the files.

  Raises:
    UserError: see `Pipeline.generate`.
  """
  for of_column in tasks.values():
    for task in of_column:  # Rejects prompts that are too long before anything is generated.
      task.validate()
      task.to_request(pipeline.layout)
  for column in protocol.columns:
    of_column, count = tasks[column.name], column.samples
    starts = range(0, len(of_column), PART)
    for i in absent([part_path(folder, column.name, s) for s in starts], column.name):
      start = starts[i]
      some = [_with_pixels(task, pipeline) for task in of_column[start : start + PART]]
      samples = pipeline.generate(some, count, rank=count > 1)
      if distributed.is_first():
        lines = [
          _line(start + i, evaluated.examples[start + i], sample, pipeline)
          for i, of_task in enumerate(samples)
          for sample in of_task
        ]
        with replacing(part_path(folder, column.name, start), "w") as file:
          file.write("".join(json.dumps(line) + "\n" for line in lines))
  distributed.gather(None)  # Wait until the first process has written the samples.


def _with_pixels(task: Task, pipeline: Pipeline) -> Task:
  """Loads the input image of a task, and resizes its center square to the model's resolution."""
  if not task.image:
    return task
  pixels: dict[str, Any] = {"image": reader.load_image(task.image, pipeline.layout.resolution)}
  return dataclasses.replace(task, **pixels)


def part_path(folder: epath.PathLike, column: str, start: int) -> epath.Path:
  """Returns the path of the part whose first example is `start`."""
  part = f"part_{start // PART:05d}.jsonl"
  return epath.Path(folder) / "samples" / protocol_lib.stem(column) / part


def _line(row: int, example: Example, sample: Sample, pipeline: Pipeline) -> dict:
  line = {
    "row": row,
    "key": example.key,
    "prompt": sample.task.prompt,
    "sample": sample.index,
    "seed": sample.seed,
    "rank": sample.rank,
    "clip_score": sample.clip_score,
    "divergence": sample.divergence,
    "neighbors": [document.key for document in sample.neighbors],
  }
  if not sample.codes:
    return {**line, "text": sample.filled[0] if sample.filled else ""}
  codes = np.asarray(sample.codes[0])
  return {**line, "copied": _copied(codes, sample, pipeline), "codes": codes.tolist()}


def _copied(codes: np.ndarray, sample: Sample, pipeline: Pipeline) -> float | None:
  """Returns the share of positions at which the first neighbor's image has the same code."""
  images = [s for d in sample.neighbors[:1] for s in d.segments if s.is_image]
  if not images:
    return None
  return float(np.mean(pipeline.layout.vocab.image_codes(images[-1].tokens) == codes))


def read_part(folder: epath.PathLike, column: str, start: int) -> list[dict]:
  """Reads, for each example of the part whose first example is `start`, the best sample's line."""
  lines = read_json_lines(part_path(folder, column, start), {"row": int})
  return [line for line in lines if line.get("rank") in (None, 1)]


def read_lines(folder: epath.PathLike, column: str, count: int) -> list[dict]:
  """Reads the line of the best sample of each of `count` examples, without its codes."""
  lines = [line for start in range(0, count, PART) for line in read_part(folder, column, start)]
  return [{name: x for name, x in line.items() if name != "codes"} for line in lines]
