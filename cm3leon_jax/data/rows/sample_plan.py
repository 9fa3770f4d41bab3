"""Plans the neighbors, CM3 spans and length of a sample from segment lengths and random numbers."""

# K neighbors of a document, T tokens of a sample.

from collections.abc import Callable, Sequence
import itertools
import typing

import numpy as np

from cm3leon_jax import templates
from cm3leon_jax.config.data import PAPER_CANDIDATES, DataConfig
from cm3leon_jax.data.rows import cm3
from cm3leon_jax.templates import Lengths, Template
from cm3leon_jax.vocab import VocabLayout


class SamplePlan(typing.NamedTuple):
  """Plan of the sample of one document: neighbors, spans and length.

  Attributes:
    neighbors: indices of the neighbors among the candidates, in the order of the row.
    dropped: whether `<mask:0>` replaces caption and neighbors.
    spans: CM3 spans as half-open ranges of the joined sample.
    length: number of tokens after the CM3 transformation.
    missing: number of neighbors that could not be picked, because the document has too few
      candidates.
    crowded_out: number of picked neighbors that did not fit into the row.
  """

  neighbors: tuple[int, ...]
  dropped: bool
  spans: tuple[tuple[int, int], ...]
  length: int
  missing: int = 0
  crowded_out: int = 0


def pick_neighbors(
  num_candidates: int, rng: np.random.Generator, config: DataConfig
) -> tuple[list[int], int]:
  """Picks neighbors. Returns their indices in row order, and the number of missing neighbors."""
  if config.neighbor_sampling == "paper":
    num_candidates = min(num_candidates, PAPER_CANDIDATES)
  wanted = config.num_neighbors
  if config.neighbor_sampling == "uniform":
    wanted = int(rng.integers(wanted + 1))
  if config.neighbor_sampling == "best":
    picked = list(range(min(wanted, num_candidates)))
  else:
    picked = rng.permutation(num_candidates)[:wanted].tolist()
  return picked, wanted - len(picked)


def plan_sample(
  document: Lengths,
  num_candidates: int,
  lengths_of: Callable[[int], Lengths],
  rng: np.random.Generator,
  config: DataConfig,
  vocab: VocabLayout,
) -> SamplePlan:
  """Makes the random choices that decide the length of a sample, for the planner and the loader.

    document and both candidates have the lengths [4, 16], two neighbors picked, two spans wanted
    sequence_length 1,000: document, two neighbors and spans
    sequence_length 60: document, first neighbor and spans
    sequence_length 30: document and spans
    sequence_length 22: only the document, 23 tokens
    sequence_length 10: only the first 11 tokens of the document

  Args:
    document: lengths and kinds of the document's segments.
    lengths_of: returns the same of a candidate neighbor; called only for those that are picked.
    rng: new generator for the sample, from which no number was drawn.
    vocab: vocabulary, whose template joins the segments.

  Returns:
    A plan of at most `config.sequence_length` + 1 tokens. If a sample is too long, the plan
    omits first whole neighbors, beginning with the last one, then spans, and then the end of the
    document.
  """
  limit, template = config.sequence_length + 1, templates.of(vocab)
  lengths, is_image = document
  neighbors: list[int] = []
  missing = 0
  if any(is_image) and rng.random() >= config.neighbor_dropout:
    neighbors, missing = pick_neighbors(num_candidates, rng, config)
    if rng.random() < config.condition_dropout and is_image[-1]:
      return SamplePlan((), True, (), min(template.dropped_length(int(lengths[-1])), limit))
  num_spans = min(int(rng.poisson(config.mean_spans)), vocab.num_masks)
  whole_segments = rng.random() < config.whole_segment_rate
  picked = len(neighbors)
  joined = [*map(lengths_of, neighbors), document]
  total = template.length(joined)
  while neighbors and total + cm3.OVERHEAD * num_spans > limit:
    del joined[len(neighbors) - 1], neighbors[-1]
    total = template.length(joined)
  num_spans = max(0, min(num_spans, (limit - total) // cm3.OVERHEAD))
  spans: tuple[tuple[int, int], ...] = ()
  if num_spans:
    spans = cm3.sample_spans(template.bounds(joined), total, num_spans, whole_segments, rng)
  length = min(total + cm3.OVERHEAD * len(spans), limit)
  return SamplePlan(tuple(neighbors), False, spans, length, missing, picked - len(neighbors))


def document_weights(
  plan: SamplePlan,
  document: Lengths,
  neighbors: Sequence[Lengths],
  neighbor_weight: float,
  template: Template,
  image_weight: float = 1.0,
) -> np.ndarray:
  """Computes the loss weight of predicting each token of a sample, [T] float32.

    </s> 50 <break> 519 520 <break> <mask:0> <break> 517 518 </s> <mask:0> 40 41 <eoss>
    lengths [2, 2], of the neighbor [1, 2], plan.spans = [(6, 8)], neighbor_weight = 0.1
    result = [0 .1 .1 .1 .1 .1 1 1 1 1 1 1 1 1 1]

  Args:
    document: lengths and kinds of the document's segments.
    neighbors: the same of each neighbor of the plan.
    image_weight: factor of the weights of image codes.
  """
  if plan.dropped:  # Only the image has a loss, not what precedes it, such as `</s> <mask:0>`.
    weights = np.ones(plan.length, np.float32)
    first = template.dropped_length(0) - 1
    weights[:first] = 0
    weights[first : first + int(document[0][-1])] *= image_weight
    return weights
  total = template.length([*neighbors, document])
  joined = np.ones(total + len(plan.spans) + 1, np.float32)
  if neighbors:
    joined[1 : template.start_of(neighbors, document)] = neighbor_weight
  joined[0] = 0
  parts = [*neighbors, document]
  kinds = itertools.chain.from_iterable(kinds for _, kinds in parts)
  for place, is_image in zip(template.bounds(parts), kinds):
    if is_image and image_weight != 1:
      joined[slice(*place)] *= image_weight
  return joined[cm3.cm3_layout(total, plan.spans)[: plan.length]]
