"""Draws captions of scenes without a model: pastes image codes of the objects that they name."""

# n captions, T codes of an image.

from collections.abc import Sequence
import itertools
import math

import numpy as np

from benchmarks.evidence.scene_recount import CORNERS, Shown, is_correct
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from examples.scenes import source
from examples.scenes.drawings import render
from examples.scenes.options import ScenesConfig
from examples.scenes.world import PLACES, Scene

Sources = dict[tuple[str, str], tuple[Scene, str]]


def sources(config: ScenesConfig) -> Sources:
  """Returns object and color -> a scene of training or the bank that has them, and the place."""
  found: Sources = {}
  for split, total in (("train", config.train), ("bank", config.bank)):
    for i in range(total):
      scene = Scene.parse(str(source.pair(config, split, i).image))
      for placed in scene.objects:
        name = placed.object, placed.color
        if name not in found or len(scene.objects) < len(found[name][0].objects):
          found[name] = scene, placed.place
  return found


def compose(include: list[dict], known: Sources) -> list[Shown]:
  """Places objects so that they fit the clauses of a caption, without those not in `known`."""
  colors = dict(known.keys())  # Any color of each object, if the caption names none.
  named: list[tuple[str, str]] = []
  for clause in include:
    named += [(clause["class"], clause.get("color") or colors[clause["class"]])] * clause["count"]
  orders = itertools.permutations(PLACES, len(named))
  shown = ([(*thing, place) for thing, place in zip(named, places)] for places in orders)
  return [one for one in next(x for x in shown if is_correct(x, include)) if one[:2] in known]


def draw(captions: Sequence[list[dict]], known: Sources, tokenizer: ImageTokenizer) -> np.ndarray:
  """Draws captions, given as clauses: [n, H, W, 3] uint8."""
  composed = [compose(include, known) for include in captions]
  needed = sorted({(name, color) for shown in composed for name, color, _ in shown})
  scenes = [Scene(()), *(known[name][0] for name in needed)]
  codes = tokenizer.encode(np.stack([render(scene) for scene in scenes]))
  half = math.isqrt(codes.shape[1]) // 2
  blank, *copied = codes.reshape(-1, 2, half, 2, half)  # Row of places, y, column of places, x.
  of = dict(zip(needed, copied))
  pasted = np.stack([blank] * len(captions))
  for image, shown in zip(pasted, composed):
    for name, color, place in shown:
      row, column = CORNERS[place]
      from_row, from_column = CORNERS[known[name, color][1]]
      image[row, :, column] = of[name, color][from_row, :, from_column]
  return tokenizer.decode(pasted.reshape(len(captions), -1))
