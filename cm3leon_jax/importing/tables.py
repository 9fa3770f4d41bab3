"""Enlarges token tables. Special tokens are before the source's ids, and image codes after them."""

# S ids of the source, V ids of the vocabulary, D width.

from collections.abc import Callable
import dataclasses

from jaxtyping import Float
import numpy as np

from cm3leon_jax.vocab import VocabLayout
from cm3leon_jax.weights.tensor_files import Tensor


@dataclasses.dataclass(frozen=True)
class Tables:
  """Describes how token tables are changed to fit a vocabulary.

  Attributes:
    rows: number of rows of the source's tables.
    end: the source's end-of-text id, whose row `</s>` gets; None if the source has no such id.
  """

  vocab: VocabLayout
  rows: int
  end: int | None = None

  def tensor(self, name: str, width: int, read: Callable[[], np.ndarray]) -> Tensor:
    """Returns the tensor of a table; `read` reads the source's table."""
    return Tensor(
      name,
      (self.vocab.size, width),
      "float32",
      lambda: extend(read(), self.vocab, self.end),
    )


def extend(
  table: Float[np.ndarray, "S D"], vocab: VocabLayout, end: int | None
) -> Float[np.ndarray, "V D"]:
  """Copies the rows of a table to the text ids; other ids get the mean of all rows.

    table = [a b c], num_special = 6, two image codes, end = 2, m = (a + b + c) / 3
    result = [m c m m m m a b c m m]

  Equal rows become different in training, because tokens in different contexts get different
  gradients.

  Args:
    table: row i belongs to the source's id i, which becomes `vocab.num_special` + i.
    vocab: layout with `text_size` = `num_special` + S.
    end: the source's end-of-text id, whose row is copied to `</s>`; None: `</s>` gets the mean.
  """
  result = np.empty((vocab.size, table.shape[1]), table.dtype)
  result[:] = table.mean(0, dtype=np.float64)
  result[vocab.num_special : vocab.text_size] = table
  if end is not None:
    result[vocab.eos] = table[end]
  return result
