"""Computes the probability that the model assigns to each given answer in the place of a mask."""

# Q questions, C answers to each, I codes of an image.

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cm3leon_jax.config import UserError
from cm3leon_jax.data.documents.store import Document, Segment
from cm3leon_jax.data.rows import loader as rows
from cm3leon_jax.data.rows.cm3 import OVERHEAD, apply_cm3_mask
from cm3leon_jax.decoding.batch import rounded
from cm3leon_jax.evaluation.likelihood import bits
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.generation.tasks import MASK, PromptLayout
from cm3leon_jax.generation.text_tasks import text_pieces
from cm3leon_jax.mesh import batch_shards


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
  layout = pipeline.layout
  samples, lengths = [], []
  for text, image, of_question in zip(texts, layout.vocab.image_ids(np.asarray(codes)), answers):
    before, after = text_pieces(layout.encode, text)
    for answer in of_question:
      hole = layout.encode(answer)
      samples.append(_sample(layout, (before, hole, after), image, text))
      lengths.append(len(hole) + 1)
  size = rounded(min(len(samples), pipeline.generator.config.batch_size), batch_shards())
  scored = bits.score_samples(params, pipeline.settings.model, samples, layout.vocab, size)
  sums = np.array([-np.log(2) * x[-n:].sum() for x, n in zip(scored, lengths)])
  return np.split(sums, np.cumsum([len(of_question) for of_question in answers])[:-1])


def _sample(
  layout: PromptLayout, pieces: Sequence[np.ndarray], image: np.ndarray, text: str
) -> np.ndarray:
  """Makes the sample of a question. `pieces` are the ids before, in and after the masked span."""
  before, hole, _ = pieces
  if not len(hole):
    raise UserError(f"an answer to '{text.replace(MASK, '?')}' is empty: give at least one word.")
  words = np.concatenate(pieces).astype(np.int32)
  document = Document("", (Segment(False, words), Segment(True, image)), "", "", "")
  sample, start = rows.join([document], layout.vocab), 1 + len(before)
  if (needed := len(sample) + OVERHEAD) > layout.positions + 1:
    raise UserError(
      f"'{text}' takes {needed} positions with its image and an answer; the model was trained on "
      f"{layout.positions}: shorten the text."
    )
  return apply_cm3_mask(sample, [(start, start + len(hole))], layout.vocab)
