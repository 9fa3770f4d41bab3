"""Computes the positions of a sample's tokens for training, evaluation and decoding."""

# T tokens of a sample.

import itertools

from jaxtyping import Int32
import numpy as np
import numpy.typing as npt

from cm3leon_jax.vocab import VocabLayout


def positions_of(
  tokens: npt.ArrayLike, vocab: VocabLayout, align_images: bool
) -> Int32[np.ndarray, " T"]:
  """Numbers the tokens of a sample 0, 1, 2, ..., or relative to its images (`align_images`).

    tokens   </s>  7 <break> 91 92 <break>  8  9 <break> 93 94 </s>
    aligned    -3 -2      -1  0  1       2 -3 -2      -1  0  1    2
    tokens   </s> <mask:0> <break> 91 92 </s> <mask:0> 7 8 <eoss>
    aligned    -3       -2      -1  0  1    2        3 4 5      6
    tokens   </s>  7 <break> <mask:0> 92 </s> <mask:0> 91 <eoss>
    aligned    -3 -2      -1        0  1    2        3  4      5
    tokens   </s> 91 92 <break>  7 <break> 93 94 </s>
    aligned    -1  0  1       2 -2      -1  0  1    2

  `tokens` are ids in the order in which the decoder reads them, so CM3 has already moved the spans
  to the end.

  Aligned positions are counted in units. A unit ends with a `<break>` that directly follows an
  image code. Position 0 of a unit is the token after the last `<break>` or `</s>` before its first
  image code. That token is the first code itself, or the sentinel that replaces the first codes.
  Without such a separator, position 0 is the unit's first token. A unit without image codes
  continues the positions of the previous unit, or starts at 0 if it is the first unit. An aligned
  position is never larger than the token's index.
  """
  tokens = np.asarray(tokens)
  positions = np.arange(len(tokens), dtype=np.int32)
  if not align_images:
    return positions
  is_image, is_break = vocab.is_image(tokens), tokens == vocab.brk
  separators = np.flatnonzero(is_break | (tokens == vocab.eos))
  codes = np.flatnonzero(is_image)
  starts = np.flatnonzero(is_image[:-1] & is_break[1:]) + 2
  for start, stop in itertools.pairwise([0, *starts.tolist(), len(tokens)]):
    first = codes[np.searchsorted(codes, start) :][:1]
    if len(first) and first[0] < stop:
      before = separators[: np.searchsorted(separators, first[0])][-1:]
      anchor = max(start, int(before[0]) + 1) if len(before) else start
      positions[start:stop] -= anchor
    elif 0 < start < stop:
      positions[start:stop] -= start - 1 - positions[start - 1]
  return positions
