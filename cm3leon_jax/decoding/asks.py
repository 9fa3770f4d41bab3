"""What a user asks for: a task and what belongs to it, from flags or from a file with one a line."""

from collections.abc import Sequence
import dataclasses
import difflib
import json
from typing import NamedTuple

from etils import epath
import pydantic.dataclasses

from cm3leon_jax.config import STRICT, UserError, build
from cm3leon_jax.decoding.sampling import SamplingConfig

MASK = "<mask>"  # How a user writes a hole into a text.
MUST, MAY, NOT = "must", "may", "not"


class Task(NamedTuple):
  """What a task takes.

  Attributes:
    prompt: MUST, MAY or NOT.
    image: likewise, a picture that is given.
    retrieves: documents may be retrieved for it.
    writes: it writes text, of a length that may be given.
    guidance: it is weighed by `SamplingConfig.guidance`.
  """

  prompt: str
  image: str
  retrieves: bool = False
  writes: bool = False
  guidance: bool = False


TASKS = {
  "text_to_image": Task(MUST, NOT, retrieves=True, guidance=True),
  "caption": Task(NOT, MUST, retrieves=True, writes=True),
  "question": Task(MUST, MUST, retrieves=True, writes=True),
  "infill_text": Task(MUST, MAY, retrieves=True, writes=True),
  "infill_image": Task(MAY, MUST, retrieves=True, guidance=True),
  "edit": Task(MUST, MUST),
  "interleaved": Task(MAY, NOT, writes=True),
  "unconditional": Task(NOT, NOT),
}


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Ask:
  """One thing to generate, as a user says it.

  Attributes:
    task: of TASKS.
    prompt: a caption, a question, an instruction, or a text with `<mask>` in it.
    image: file of the picture that is given, "" if none is.
    box: of infill_image: left, top, right, bottom in pixels of the model's resolution, right and bottom outside.
    length: most tokens of text for a hole, or of an interleaved document; 0: as many as `tasks` says.
    seed: of its first sample.
    retrieve: number of documents.
    keep_neighbors: the unconditional stream of text_to_image keeps them.
    sampling: how tokens are drawn.
    row: asks of one row differ in their settings alone.
    where: it was read, for messages, e.g. "my.jsonl, line 3"; "" for flags.
  """

  task: str = "text_to_image"
  prompt: str = ""
  image: str = ""
  box: tuple = ()
  length: int = 0
  seed: int = 0
  retrieve: int = 0
  keep_neighbors: bool = False
  sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
  row: int = 0
  where: str = ""

  def error(self, sentence) -> UserError:
    """With the place that it was read at."""
    return UserError(f"{self.where}: {sentence}" if self.where else str(sentence))


FIELDS = (
  "task",
  "prompt",
  "image",
  "box",
  "length",
  "seed",
  "retrieve",
  "keep_neighbors",
)  # Of a line, beside those of SamplingConfig.


def check(ask: Ask) -> None:
  """Raises UserError if the task is unknown, or what it takes is missing, surplus or out of range."""
  if ask.task not in TASKS:
    raise ask.error(f"task is '{ask.task}'; it must be one of {', '.join(TASKS)}.")
  task = TASKS[ask.task]
  for name, need, given in (
    ("prompt", task.prompt, ask.prompt.strip()),
    ("image", task.image, ask.image),
  ):
    if need == MUST and not given:
      raise ask.error(
        f"task {ask.task} needs {'an' if name == 'image' else 'a'} {name}, and none is given."
      )
    if need == NOT and given:
      raise ask.error(
        f"task {ask.task} takes no {name}: leave '{given}' out, or name another task."
      )
  masks = ask.prompt.count(MASK)
  if ask.task == "infill_text" and not masks:
    raise ask.error(
      f"task infill_text fills in what {MASK} stands for: put one into the prompt '{ask.prompt}'."
    )
  if ask.task != "infill_text" and masks:
    raise ask.error(
      f"the prompt '{ask.prompt}' has a {MASK}, which only task infill_text takes; this one is {ask.task}."
    )
  if ask.task == "infill_image" and not ask.box:
    raise ask.error(
      "task infill_image needs a box, left,top,right,bottom in pixels, and none is given."
    )
  if ask.task != "infill_image" and ask.box:
    raise ask.error(f"a box is given, which only task infill_image takes; this one is {ask.task}.")
  if ask.retrieve and not task.retrieves:
    raise ask.error(f"retrieve is {ask.retrieve}; task {ask.task} retrieves no documents.")
  if ask.length and not task.writes:
    raise ask.error(f"length is {ask.length}; task {ask.task} writes no text.")
  for name, low in (("length", 0), ("retrieve", 0), ("seed", 0)):
    if not low <= getattr(ask, name) < 2**32:
      raise ask.error(f"{name} is {getattr(ask, name)}; it must lie in [{low}, 2^32).")


def pair(defaults: Ask, prompts: Sequence[str], images: Sequence[str]) -> list[Ask]:
  """Prompts with images, one for each or one for all; each next one has the next seed.

  Raises:
    UserError: two prompts and three images, say.
  """
  count = max(len(prompts), len(images), 1)
  if any(len(values) not in (0, 1, count) for values in (prompts, images)):
    raise UserError(
      f"{len(prompts)} prompts and {len(images)} images are given: give one of each for the other, or one for all."
    )
  of = lambda values, i: values[i if len(values) > 1 else 0] if values else ""
  at = lambda i: {
    "prompt": of(prompts, i),
    "image": of(images, i),
    "seed": defaults.seed + i,
    "row": i,
  }
  return [dataclasses.replace(defaults, **at(i)) for i in range(count)]


def read(path: epath.PathLike, defaults: Ask, retrieve: int | None = None) -> list[Ask]:
  """One ask a line of a JSONL file; what a line leaves out is taken from `defaults`, its seed from the place of the line.

    {"task": "text_to_image", "prompt": "red apple", "guidance": 5, "top_k": 64}
    {"task": "caption", "image": "photos/cat.jpg"}

  Images are paths relative to the file's folder.

  Args:
    path: of the file.
    defaults: see above; an empty line is passed over.
    retrieve: documents where a line does not say; None: `default_retrieve` of its task.

  Raises:
    UserError: naming file and line: no JSON object, an unknown field, a value that is refused, or what `check` refuses.
  """
  path = epath.Path(path)
  if not path.exists():
    raise UserError(
      f"--prompts names {path}, which does not exist: give a file with one JSON object a line."
    )
  asks = []
  for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
    if line.strip():
      i, where = len(asks), f"{path}, line {number}"
      fields = _object(line, where)
      task = fields.get("task", defaults.task)
      usual = {
        "seed": defaults.seed + i,
        "retrieve": default_retrieve(task) if retrieve is None else retrieve,
      }
      if fields.get("image") and "://" not in str(fields["image"]):
        fields["image"] = str(path.parent / str(fields["image"]))
      asks.append(_ask({**usual, **fields}, dataclasses.replace(defaults, row=i, where=where)))
      check(asks[-1])
  if not asks:
    raise UserError(f"--prompts names {path}, which has no line: give one JSON object a line.")
  return asks


def default_retrieve(task: str) -> int:
  """Pictures are drawn with two documents, as most of training was; what else may have some has none if nobody says."""
  return 2 if task == "text_to_image" else 0


def _object(line: str, where: str) -> dict:
  try:
    fields = json.loads(line)
  except json.JSONDecodeError as error:
    raise UserError(f"{where} is not valid JSON ({error}).") from error
  if not isinstance(fields, dict):
    raise UserError(f"{where} is a {type(fields).__name__}; it must be a JSON object.")
  known = [*FIELDS, *(f.name for f in dataclasses.fields(SamplingConfig))]
  for name in fields:
    if name not in known:
      close = difflib.get_close_matches(name, known, 1)
      hint = f"did you mean '{close[0]}'?" if close else f"it has {', '.join(known)}."
      raise UserError(f"{where} has no field '{name}': {hint}")
  return fields


def _ask(fields: dict, defaults: Ask) -> Ask:
  """Raises UserError naming the place, the field and what it must be."""
  own = {f.name: getattr(defaults, f.name) for f in dataclasses.fields(Ask) if f.name != "sampling"}
  own |= {name: value for name, value in fields.items() if name in FIELDS}
  drawn = {name: value for name, value in fields.items() if name not in FIELDS}
  try:
    sampling = build(SamplingConfig, {**dataclasses.asdict(defaults.sampling), **drawn}, "line")
    return dataclasses.replace(build(Ask, own, "line"), sampling=sampling)
  except UserError as error:
    raise defaults.error(str(error).removeprefix("config.line").lstrip(".: ")) from error
