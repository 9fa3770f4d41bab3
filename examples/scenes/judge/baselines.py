"""Computes baselines for judged images from the training scenes of a run.

The caption of a held-out scene may also occur in training with another image, because captions such
as "two hearts" describe many scenes. Therefore each caption is looked up: does training have the
same words, the same claims, or an image that the judge would accept for the caption?
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple, Self

import numpy as np

from cm3leon_jax.data.documents.store import DocumentStore
from examples.scenes import source
from examples.scenes.captions import OPPOSITES
from examples.scenes.judge.facts import Found, check
from examples.scenes.options import ScenesConfig
from examples.scenes.world import Placed, Scene


class Known(NamedTuple):
  """What training has in common with a caption.

  Attributes:
    caption: whether a training caption has the same words.
    claims: whether a training caption makes the same claims, in any words.
    image: whether a training image is correct for the caption, so that an ideal lookup would
      succeed.
  """

  caption: bool
  claims: bool
  image: bool


class TrainingScenes:
  """Captions, claims and scenes of the training records."""

  def __init__(self, records: Iterable[tuple[str, dict]]):
    """Reads records: pairs of a caption and the field `facts` of its document."""
    self._captions, self._claims = set(), set()
    self._scenes: dict[frozenset, set[str]] = defaultdict(set)  # Counts of objects -> scenes.
    for caption, facts in records:
      self._captions.add(caption)
      self._claims.add(claims_of(facts["include"]))
      placed = [Placed(o["class"], o["color"], o["place"]) for o in facts["objects"]]
      numbers = Counter(one.object for one in placed)
      self._scenes[frozenset(numbers.items())].add(Scene.of(placed).facts_key)

  @classmethod
  def of_store(cls, store: DocumentStore, decode: Callable[[np.ndarray], str]) -> Self:
    """Reads the training documents of a run. Documents without facts are skipped."""
    documents = (store[i] for i in range(len(store)))
    return cls((decode(d.segments[0].tokens), d.facts) for d in documents if d.facts)

  @classmethod
  def of_config(cls, config: ScenesConfig) -> Self:
    """Makes the training scenes of a config, without their images."""
    pairs = (source.pair(config, "train", i) for i in range(config.train))
    return cls((pair.caption, pair.facts) for pair in pairs)

  def known(self, caption: str, facts: dict) -> Known:
    """Looks up a caption and its facts in the training scenes."""
    include = facts["include"]
    numbers: Counter[str] = Counter()
    for clause in include:
      numbers[clause["class"]] += clause["count"]
    alike = self._scenes.get(frozenset(numbers.items()), ())
    return Known(
      caption in self._captions,
      claims_of(include) in self._claims,
      any(check(_drawn(key), include).correct for key in alike),
    )


def claims_of(include: list[dict]) -> tuple:
  """Returns the claims of a caption in a canonical form that does not depend on the wording.

  "a bell left of a key" and "a key right of a bell" have equal claims.
  """
  order = sorted(range(len(include)), key=lambda i: sorted(map(str, include[i].items())))
  order.sort(key=lambda i: include[i]["class"])
  relation = ""
  for i, clause in enumerate(include):
    if "position" in clause:
      stated, other = clause["position"]
      relation = stated if order.index(i) < order.index(other) else OPPOSITES[stated]
  fields = ("class", "count", "color", "place")
  return (*(tuple(include[i].get(field) for field in fields) for i in order), relation)


def _drawn(facts_key: str) -> list[Found]:
  """Returns the objects of a scene, as a judge without errors would find them."""
  placed = Scene.parse(facts_key).objects
  return [Found(p.object, p.color, p.place, 1.0, (0, 0, 1, 1)) for p in placed]
