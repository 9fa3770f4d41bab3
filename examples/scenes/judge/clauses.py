"""Parses captions of scenes into clauses, in order to check generated captions.

The grammar accepts the wordings of `captions` and free combinations of their parts. Parts are
objects (with an article or a number, and optionally a color), places, relations, and words that
claim nothing. A caption with any other word is rejected, so an invented object is never overlooked.
"""

from collections.abc import Sequence
import functools
import re
from typing import Any, NamedTuple

from examples.scenes.captions import NUMBERS, PLURAL_WORDS, RELATIONS, plural
from examples.scenes.options import COLORS, COMMON
from examples.scenes.world import ICONS, PLACES

_ARTICLES = ("a", "an", "the")
_NUMBERS = {
  "one": 1,
  **{word: number for number, word in NUMBERS.items()},
  **{str(number): number for number in (1, *NUMBERS)},
}
_PLACES = {
  f"{preposition} the {place}{corner}": place
  for place in PLACES
  for preposition in ("at", "in")
  for corner in ("", " corner")
}
_RELATIONS = {phrase: relation for relation, phrases in RELATIONS.items() for phrase in phrases}
_AND = ("and", "and also", "together with", ",")
_FILLERS = (
  "there is",
  "there are",
  "an image of",
  "an image with",
  "we see",
  "on white",
  "stands",
  "stand",
)


class _Part(NamedTuple):
  """Part of a caption: its kind, its meaning and its number of words."""

  kind: str
  value: Any
  words: int


def parse(caption: str) -> list[dict] | None:
  """Lists what a caption claims, in the layout of `facts.check`.

    parse("a red bell left of two keys") =
      [{"class": "bell", "count": 1, "color": "red", "position": ["left of", 1]},
       {"class": "key", "count": 2}]

  Returns the clauses, or None if the caption is rejected. The reason is an unknown word, no object,
  an object with neither article nor number, or an ambiguous place or relation.
  """
  words = re.findall(r"[a-z0-9]+|,", caption.lower())
  groups: list[list[_Part]] = [[]]
  while words:
    parts = [part for part in (_phrase(words), _object(words)) if part]
    part = max(parts, key=lambda part: part.words, default=None)
    if part is None:
      return None
    words = words[part.words :]
    if part.kind == "and":
      groups.append([])
    elif part.kind != "filler":
      groups[-1].append(part)
  clauses: list[dict] = []
  for group in filter(None, groups):
    claims = _claims(group)
    if claims is None:
      return None
    clauses += [_moved(claim, len(clauses)) for claim in claims]
  return clauses or None


def _moved(clause: dict, places: int) -> dict:
  """Adds `places` to the index in the field `position` of a clause."""
  if "position" not in clause:
    return clause
  relation, reference = clause["position"]
  return {**clause, "position": [relation, reference + places]}


@functools.cache
def _phrases() -> dict[str, _Part]:
  """Maps each phrase that does not name an object to its part."""
  phrases = [
    *((phrase, "place", place) for phrase, place in _PLACES.items()),
    *((phrase, "relation", relation) for phrase, relation in _RELATIONS.items()),
    *((phrase, "and", "") for phrase in _AND),
    *((phrase, "filler", "") for phrase in _FILLERS),
  ]
  return {text: _Part(kind, value, len(text.split())) for text, kind, value in phrases}


def _phrase(words: Sequence[str]) -> _Part | None:
  """Reads the longest phrase without an object: "at the top left", "to the left of", "and"."""
  most = max(part.words for part in _phrases().values())
  for length in range(min(most, len(words)), 0, -1):
    if part := _phrases().get(" ".join(words[:length])):
      return part
  return None


@functools.cache
def _names() -> dict[str, tuple[str, bool, bool]]:
  """Maps each singular and plural to (name, may mean one object, may mean several objects)."""
  names = {name: (name, True, False) for name in ICONS}
  for name in COMMON:
    several = plural(name)
    names[several] = (name, several == name, True)
  return names


def _object(words: Sequence[str]) -> _Part | None:
  """Reads the object with the longest name, with its article or number: "two red bells"."""
  article, number = words[0] in _ARTICLES, _NUMBERS.get(words[0])
  start = int(article or number is not None)
  readings = [("", start)]
  if words[start : start + 1] and words[start] in COLORS:
    readings.append((words[start], start + 1))
  most = max(len(name.split()) for name in _names())
  result = []
  for color, first in readings:
    for last in range(first + 1, min(first + most, len(words)) + 1):
      name, one, several = _names().get(" ".join(words[first:last]), ("", False, False))
      bare = not article and number is None
      count = number or 1
      if name and (several if count > 1 else one) and (not bare or name in PLURAL_WORDS):
        clause = {"class": name, "count": count, **({"color": color} if color else {})}
        result.append(_Part("object", clause, last))
  return max(result, key=lambda part: part.words, default=None)


def _claims(parts: Sequence[_Part]) -> list[dict] | None:
  """Lists the clauses of the parts between two "and". `position` has indices into this list."""
  match [part.kind for part in parts]:
    case ["object"]:
      return [parts[0].value]
    case ["object", "place"]:
      return [{**parts[0].value, "place": parts[1].value}]
    case ["place", "object"]:
      return [{**parts[1].value, "place": parts[0].value}]
    case ["object", "relation", "object"]:
      return [{**parts[0].value, "position": [parts[1].value, 1]}, parts[2].value]
    case ["relation", "object", "object"]:  # "left of a key stands a bell"
      return [{**parts[2].value, "position": [parts[0].value, 1]}, parts[1].value]
  return None
