"""Tables of tokens for a larger vocabulary: special tokens before a source's ids, codes after."""

# S ids of the source, V ids of the vocabulary, D width.

from collections.abc import Callable
import dataclasses

from jaxtyping import Float
import numpy as np

from cm3leon_jax.vocab import VocabLayout
from cm3leon_jax.weights.tensor_files import Tensor


@dataclasses.dataclass(frozen=True)
class Tables:
  """How tables of tokens become those of a vocabulary.

  Attributes:
    vocab: the vocabulary.
    rows: of the source's tables.
    end: id of the source's end of text, whose row `</s>` starts from; None: it has none.
  """

  vocab: VocabLayout
  rows: int
  end: int | None = None

  def tensor(self, name: str, width: int, read: Callable[[], np.ndarray]) -> Tensor:
    """Returns the tensor of a table that `read` reads."""
    return Tensor(
      name,
      (self.vocab.size, width),
      "float32",
      lambda: extend(read(), self.vocab, self.end),
    )


def extend(
  table: Float[np.ndarray, "S D"], vocab: VocabLayout, end: int | None
) -> Float[np.ndarray, "V D"]:
  """Puts the rows of a table at the text ids; other ids get their mean.

    table = [a b c], num_special = 6, two image codes, end = 2, m = (a + b + c) / 3
    result = [m c m m m m a b c m m]

  Equal rows do not stay equal in training: each token stands at other places of the data, so each
  row has another gradient.

  Args:
    table: row i is of the source's id i, which becomes `vocab.num_special` + i.
    vocab: with `text_size` = `num_special` + S.
    end: id of the source's end of text, whose row `</s>` gets; None: the mean.
  """
  result = np.empty((vocab.size, table.shape[1]), table.dtype)
  result[:] = table.mean(0, dtype=np.float64)
  result[vocab.num_special : vocab.text_size] = table
  if end is not None:
    result[vocab.eos] = table[end]
  return result
