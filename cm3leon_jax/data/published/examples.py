"""Defines an example of a public evaluation: what is given, and what people wrote about it."""

import collections
from collections.abc import Iterable, Iterator
import dataclasses
import hashlib

from etils import epath

from cm3leon_jax.config import UserError


@dataclasses.dataclass(frozen=True)
class Example:
  """An image with a task and its references.

  Attributes:
    key: unique in its format and split.
    group: id of the image; examples of one image are not independent, so intervals resample groups.
    image: path, local or in a bucket; None: no image.
    prompt: question about the image, or caption to draw; None: the image alone is given.
    references: texts that people wrote: captions, a paragraph, the answers of all annotators with
      repetitions, or the answer in the dialog.
    question_type: class of the question, e.g. "what color is the" (VQA v2, OK-VQA).
    answer_type: class of the answer, e.g. "yes/no" (VQA v2, OK-VQA, VizWiz).
    answerable: whether the question has an answer (VizWiz); None: not known.
    caption: of the image, which begins the dialog (VisDial).
    history: earlier questions of the dialog, each with its answer (VisDial).
    candidates: answers to rank (VisDial: 100).
    relevance: of each candidate, in [0, 1].
    answer_index: place of the reference among the candidates; None: no candidates.
  """

  key: str
  group: str
  image: str | None = None
  prompt: str | None = None
  references: tuple[str, ...] = ()
  question_type: str = ""
  answer_type: str = ""
  answerable: bool | None = None
  caption: str = ""
  history: tuple[tuple[str, str], ...] = ()
  candidates: tuple[str, ...] = ()
  relevance: tuple[float, ...] = ()
  answer_index: int | None = None


def caption_prompts(examples: Iterable[Example]) -> Iterator[Example]:
  """Yields each caption as the prompt of its image; blank ones are left out.

  Example("42", "42", "42.jpg", references=("a cat ", "two cats")) becomes
  Example("42/0", "42", "42.jpg", prompt="a cat", references=("a cat ",)) and
  Example("42/1", "42", "42.jpg", prompt="two cats", references=("two cats",))
  """
  for example in examples:
    for number, text in enumerate(example.references):
      if text.strip():
        yield dataclasses.replace(
          example, key=f"{example.key}/{number}", prompt=text.strip(), references=(text,)
        )


def choose(examples: Iterable[Example], count: int, seed: int = 0) -> list[Example]:
  """Chooses examples at random: one of each image before a second one of any.

    keys of the images a and b: a/0 a/1 a/2 b/0
    keys of choose(examples, 3): b/0 a/2 a/1

  The choice depends on the seed, the keys and the groups, not on the order of the examples. A
  smaller choice is the beginning of a larger one. Each image is equally likely, however many
  examples it has.

  Args:
    examples: with different keys.
    count: number to choose.
    seed: of the choice.

  Raises:
    UserError: `count` is negative, or there are fewer examples.
  """

  def rank(name: str) -> bytes:
    return hashlib.sha256(f"{seed} {name}".encode()).digest()

  turns: list[tuple[int, bytes, Example]] = []
  seen: collections.Counter[str] = collections.Counter()
  for example in sorted(examples, key=lambda e: rank(e.key)):
    turns.append((seen[example.group], rank(example.group), example))
    seen[example.group] += 1
  if not 0 <= count <= len(turns):
    raise UserError(
      f"{count} of {len(turns)} examples are to be chosen; ask for 0 to {len(turns)}."
    )
  turns.sort(key=lambda turn: turn[:2])
  return [example for *_, example in turns[:count]]


def check_images(examples: Iterable[Example]) -> None:
  """Raises UserError if images of the examples do not exist; it names the first and its example."""
  first: dict[str, str] = {}
  for example in examples:
    if example.image is not None:
      first.setdefault(example.image, example.key)
  absent = [image for image in first if not epath.Path(image).exists()]
  if absent:
    raise UserError(
      f"{absent[0]}, the image of example {first[absent[0]]}, does not exist ({len(absent)} of "
      f"{len(first)} images are absent); give the folder with the release's folders of images."
    )
