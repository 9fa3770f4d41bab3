"""Computes log-probabilities of texts, of images given texts, and of texts given images.

`score_answers` computes the probability of given answers in the place of a mask.
"""

# n pairs, Q questions, C answers to each, I codes of an image.

from collections.abc import Sequence
import dataclasses

import numpy as np
import numpy.typing as npt

from cm3leon_jax.data.documents.store import Document, Segment
from cm3leon_jax.data.rows import loader as rows
from cm3leon_jax.data.rows.cm3 import OVERHEAD, apply_cm3_mask
from cm3leon_jax.decoding.batch import rounded
from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation.likelihood import bits
from cm3leon_jax.generation.given_images import load_image
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.generation.tasks import MASK, GivenImage, PromptLayout
from cm3leon_jax.generation.text_tasks import text_pieces
from cm3leon_jax.mesh import batch_shards


@dataclasses.dataclass(frozen=True)
class PairScore:
  """Log-probabilities of a text and an image, in nats.

  A log-probability is a sum over the tokens of the text, or over the codes of the image. `<break>`,
  `</s>`, `<eoss>` and neighbors are not counted. The model spreads its probability over the whole
  vocabulary.

  Attributes:
    text: log p(text), if the text is first. `cm3leon evaluate` measures the same in bits.
    image_given_text: log p(image | text), if the text is first. `cm3leon evaluate` measures the
      same in bits.
    text_given_image: log p(text | image), if the text is the masked span of the document.
  """

  text: float
  image_given_text: float
  text_given_image: float
  text_tokens: int
  image_tokens: int


def score(
  pipeline: Pipeline, params: dict, pairs: Sequence[tuple[str, GivenImage]], retrieve: int = 0
) -> list[PairScore]:
  """Scores pairs of a text and an image. Documents that the text retrieves precede each pair.

    </s> documents text <break> image </s>
    </s> documents <mask:0> <break> image </s> <mask:0> text <eoss>

  Args:
    params: parameters of the decoder as it was trained, on the current mesh.
    pairs: texts and images. An image may have any type that tasks accept.
    retrieve: largest number of retrieved documents. Documents that do not fit are left out.

  Raises:
    UserError: a text is empty or does not fit, or an image cannot be read.
  """
  resolution = pipeline.layout.resolution
  images = np.stack([load_image(image, resolution) for _, image in pairs])
  codes = pipeline.image_tokenizer.encode(images)
  return score_codes(pipeline, params, [text for text, _ in pairs], codes, retrieve)


def score_codes(
  pipeline: Pipeline, params: dict, texts: Sequence[str], codes: npt.ArrayLike, retrieve: int = 0
) -> list[PairScore]:
  """Scores pairs whose images are given as `codes`, [n, I]; see `score`."""
  layout, vocab = pipeline.layout, pipeline.layout.vocab
  neighbors: list = [()] * len(texts)
  if retrieve:
    neighbors = [found for found, _ in pipeline.search([("text", t) for t in texts], retrieve)]
  documents, plain, masked = [], [], []
  for text, image, found in zip(texts, vocab.image_ids(np.asarray(codes)), neighbors):
    segments = Segment(False, layout.encode(text)), Segment(True, image)
    documents.append(Document("", segments, "", "", ""))
    _check_length(len(segments[0].tokens), layout)
    kept = bits.fit_neighbors(documents[-1], found, layout.positions, vocab)
    plain.append(rows.join([*kept, documents[-1]], vocab))
    kept = bits.fit_neighbors(documents[-1], found, layout.positions - OVERHEAD, vocab)
    sample = rows.join([*kept, documents[-1]], vocab)
    [(start, stop), _], length = bits.places_in(documents[-1], vocab)
    before = len(sample) - length
    masked.append(apply_cm3_mask(sample, [(before + start, before + stop)], vocab))
  nats = [-np.log(2) * x for x in _bits(pipeline, params, [*plain, *masked], len(texts))]
  scores = []
  for sample, document, first, last in zip(plain, documents, nats, nats[len(texts) :]):
    own = bits.own_targets(sample, document, vocab)
    text = first[own["text"]]
    span = last[-len(text) - 1 : -1]  # <eoss> follows the span.
    image_sum, span_sum = float(first[own["image"]].sum()), float(span.sum())
    sums = (float(text.sum()), image_sum, span_sum)
    scores.append(PairScore(*sums, len(text), layout.image_tokens))
  return scores


def score_answers(
  pipeline: Pipeline,
  params: dict,
  texts: Sequence[str],
  answers: Sequence[Sequence[str]],
  codes: npt.ArrayLike,
) -> list[np.ndarray]:
  """Computes log p(answer, <eoss>) for each answer to each question.

    text = "Question: how many? Answer: <mask>.", answers = ["two", "two of them"]:
    </s> Question: how many? Answer: <mask:0>. <break> image </s> <mask:0> two <eoss>
    and the same sample with the second answer

  The log-probability of <eoss> is included. Without it, an answer such as "two" could never score
  below a longer answer with the same beginning.

  Args:
    params: parameters of the decoder as it was trained, on the current mesh.
    texts: Q texts with one MASK each.
    answers: C answers to each question.
    codes: [Q, I] codes of the image that follows each text.

  Returns:
    For each question, [C] log-probabilities in nats.

  Raises:
    UserError: an answer is empty, or a text and its image take more positions than the model has.
  """
  layout, samples, lengths = pipeline.layout, [], []
  for text, image, of_question in zip(texts, layout.vocab.image_ids(np.asarray(codes)), answers):
    before, after = text_pieces(layout.encode, text)
    for answer in of_question:
      hole = layout.encode(answer)
      if not len(hole):
        raise UserError(f"an answer to '{text.replace(MASK, '?')}' is empty.")
      words = np.concatenate([before, hole, after]).astype(np.int32)
      _check_length(len(words), layout)
      document = Document("", (Segment(False, words), Segment(True, image)), "", "", "")
      [(first, _), _], _ = bits.places_in(document, layout.vocab)
      sample, start = rows.join([document], layout.vocab), first + len(before)
      samples.append(apply_cm3_mask(sample, [(start, start + len(hole))], layout.vocab))
      lengths.append(len(hole) + 1)
  scored = _bits(pipeline, params, samples, len(samples))
  sums = np.array([-np.log(2) * x[-n:].sum() for x, n in zip(scored, lengths)])
  return np.split(sums, np.cumsum([len(of_question) for of_question in answers])[:-1])


def _bits(
  pipeline: Pipeline, params: dict, samples: Sequence[np.ndarray], most: int
) -> list[np.ndarray]:
  """Computes the bits of each target, in batches of up to about `most` samples."""
  size = rounded(min(most, pipeline.generator.config.batch_size), batch_shards())
  model, vocab = pipeline.settings.model, pipeline.layout.vocab
  return bits.score_samples(params, model, samples, vocab, size)


def _check_length(text: int, layout: PromptLayout) -> None:
  if not text:
    raise UserError("the text is empty: give at least one word.")
  needed = text + layout.image_tokens + 2 + OVERHEAD
  if needed > layout.positions:
    raise UserError(
      f"the text has {text} tokens and takes {needed} positions with its image; the model was "
      f"trained on {layout.positions}: shorten the text."
    )
