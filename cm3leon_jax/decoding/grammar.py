"""Which tokens may come next: a small state machine that is carried through the decoding scan."""

# B prompts, R rows of the output table.

import dataclasses

import jax.numpy as jnp
import numpy as np

from cm3leon_jax.vocab import VocabLayout


@dataclasses.dataclass(frozen=True)
class TextToImage:
  """After a prompt that ends in `<break>`: exactly `image_tokens` codes, then `</s>` or `<break>`.

  The state is [B] int32, the codes still to come; 0: the image is complete, -1: the sample is over.

    state 2 -code-> 1 -code-> 0 -</s> or <break>-> -1
  """

  vocab: VocabLayout
  image_tokens: int

  def __post_init__(self):
    if self.image_tokens < 1:
      raise ValueError(f"image_tokens is {self.image_tokens}; an image has at least one code.")

  def start(self, batch: int):
    return jnp.full((batch,), self.image_tokens, jnp.int32)

  def advance(self, state):
    """State after one more token; which one does not matter, since only legal ones are drawn."""
    return jnp.maximum(state - 1, -1)

  def legal(self, state, ids):
    """[B] states and [R] int32 ids -> [B, R] bool: which ids may come next; none after the end."""
    image, end = self.vocab.is_image(ids), (ids == self.vocab.eos) | (ids == self.vocab.brk)
    return ((state > 0)[:, None] & image[None]) | ((state == 0)[:, None] & end[None])

  @property
  def image_rows(self) -> np.ndarray:
    """Ids that can be legal while codes are to come: the only rows of the output table computed then."""
    return np.arange(self.vocab.text_size, self.vocab.size, dtype=np.int32)

  @property
  def end_rows(self) -> np.ndarray:
    """Ids that can be legal once the image is complete."""
    return np.array([self.vocab.eos, self.vocab.brk], np.int32)
