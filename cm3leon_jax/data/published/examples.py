"""Defines the examples of public evaluations: inputs, and the reference texts that people wrote."""

import collections
from collections.abc import Iterable, Iterator
import dataclasses
import hashlib

from etils import epath

from cm3leon_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Example:
  """One example of an evaluation: an image or prompt, with references.

  Attributes:
    key: unique within its format and split.
    group: id of the image. Examples of one image are not independent, so confidence intervals are
      computed by resampling groups.
    image: local path or GCS URL. None if the example has no image.
    prompt: question about the image, or caption to draw. None if the image is the only input.
    references: texts that people wrote. These are captions, a paragraph, the answer in the dialog,
      or the answers of all annotators, including repeated answers.
    question_type: class of the question, e.g. "what color is the" (VQA v2, OK-VQA).
    answer_type: class of the answer, e.g. "yes/no" (VQA v2, OK-VQA, VizWiz).
    answerable: whether the question has an answer (VizWiz). None if unknown.
    caption: caption of the image, with which the dialog begins (VisDial).
    history: (question, answer) of each earlier round of the dialog (VisDial).
    candidates: answers that a model ranks (VisDial: 100 answers).
    relevance: relevance of each candidate, in [0, 1].
    answer_index: index of the reference in `candidates`. None if there are no candidates.
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
  """Yields one example per caption, with the caption as the prompt. Skips blank captions.

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
  """Chooses examples at random. Each image gets one example before any image gets a second one.

    keys of the examples of the images a and b: a/0 a/1 a/2 b/0
    keys of the examples in choose(examples, 3): b/0 a/2 a/1

  The choice depends on the seed, the keys and the groups, but not on the order of the examples. A
  smaller choice is a prefix of a larger one. Each image is equally likely, regardless of its number
  of examples. All keys must differ.

  Raises:
    UserError: `count` is negative or exceeds the number of examples.
  """

  def rank(name: str) -> bytes:
    return hashlib.sha256(f"{seed} {name}".encode()).digest()

  turns: list[tuple[int, bytes, Example]] = []
  seen: collections.Counter[str] = collections.Counter()
  for example in sorted(examples, key=lambda e: rank(e.key)):
    turns.append((seen[example.group], rank(example.group), example))
    seen[example.group] += 1
  if not 0 <= count <= len(turns):
    raise UserError(f"cannot choose {count} of {len(turns)} examples; choose 0 to {len(turns)}.")
  turns.sort(key=lambda turn: turn[:2])
  return [example for *_, example in turns[:count]]


def check_images(examples: Iterable[Example]) -> None:
  """Raises UserError if an image of an example does not exist. Names the first missing image."""
  first: dict[str, str] = {}
  for example in examples:
    if example.image is not None:
      first.setdefault(example.image, example.key)
  absent = [image for image in first if not epath.Path(image).exists()]
  if absent:
    raise UserError(
      f"{absent[0]}, the image of example {first[absent[0]]}, does not exist ({len(absent)} of "
      f"{len(first)} images are missing); give the folder that contains the release's image "
      "folders."
    )
