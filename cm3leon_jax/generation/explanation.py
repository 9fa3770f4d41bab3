"""Explains an image: which of its codes each retrieved document made more likely."""

# K codes of a row of an image, H height, W width.

from collections.abc import Sequence
import dataclasses

import jax
from jaxtyping import Bool, Float32
import numpy as np
from PIL import Image

from cm3leon_jax.data.documents.store import Document
from cm3leon_jax.decoding import log_probs
from cm3leon_jax.decoding.generator import Generator
from cm3leon_jax.generation.image_tasks import TextToImage
from cm3leon_jax.generation.tasks import PromptLayout, Task
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer

LEAST = 1.0  # Log-ratio, in nats, from which a code counts as drawn by the document.
MOST = 4.0  # Log-ratio with the strongest color on a heat map.
COLOR = (214, 0, 108)
REFUSED = "only images of text_to_image after retrieved documents can be explained: set retrieve."


@dataclasses.dataclass(frozen=True, repr=False)
class Influence:
  """Influence of one retrieved document on an image.

  Attributes:
    document: the document, with `key`, `source`, `license` and `attribution`.
    ratios: for each code, log p(code | all documents) - log p(code | all but this one), in nats,
      after the caption and the codes before it, without guidance.
    sample: image that is explained, uint8 [H, W, 3].
  """

  document: Document
  ratios: Float32[np.ndarray, "K K"]
  sample: np.ndarray
  layout: PromptLayout
  tokenizer: ImageTokenizer

  @property
  def caption(self) -> str:
    """Caption of the document."""
    return self.layout.decode(self.document.segments[0].tokens)

  @property
  def image(self) -> Image.Image:
    """Image of the document."""
    codes = self.layout.vocab.image_codes(self.document.segments[1].tokens)
    return Image.fromarray(np.asarray(self.tokenizer.decode(codes[None])[0]))

  @property
  def squares(self) -> Bool[np.ndarray, "K K"]:
    """The codes that the document made at least e times as likely."""
    return self.ratios >= LEAST

  @property
  def heat_map(self) -> Image.Image:
    """The image in gray. Codes are the more colored, the more likely the document made them."""
    sample = Image.fromarray(self.sample)
    strength = (255 * np.clip(self.ratios / MOST, 0, 1)).astype(np.uint8)
    mask = Image.fromarray(strength).resize(sample.size, Image.Resampling.NEAREST)
    gray = sample.convert("L").convert("RGB")
    return Image.composite(Image.new("RGB", sample.size, COLOR), gray, mask)


def explain(
  generator: Generator,
  layout: PromptLayout,
  tokenizer: ImageTokenizer,
  mesh: jax.sharding.Mesh,
  task: Task,
  sample: np.ndarray,
  codes: Sequence[np.ndarray],
  documents: Sequence[Document],
) -> list[Influence]:
  """Computes the influence of each document on the image `sample` of `task`, with its `codes`.

  One forward pass has a row with all documents, and a row without each.

  Raises:
    UserError: there are no documents, or the task is not text_to_image.
  """
  if not documents or not isinstance(task, TextToImage):
    raise task.error(REFUSED)
  image = layout.vocab.image_ids(codes[0])
  kept = [documents, *([*documents[:i], *documents[i + 1 :]] for i in range(len(documents)))]
  prompts = [task.to_request(layout, neighbors=some).streams[0] for some in kept]
  with jax.set_mesh(mesh):
    result = log_probs.of_last_image(generator, [np.concatenate([p, image]) for p in prompts])
  ratios = (result[0] - result[1:]).reshape(-1, layout.side, layout.side)
  return [Influence(d, r, sample, layout, tokenizer) for d, r in zip(documents, ratios)]
