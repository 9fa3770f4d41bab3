"""Describes training rows as text, and draws their images on one contact sheet."""

# T tokens of a sample, H height and W width of an image, C codes of an image.

from collections.abc import Iterator, Sequence

import numpy as np

from cm3leon_jax import templates
from cm3leon_jax.data.rows import cm3
from cm3leon_jax.data.rows.loader import RowLoader
from cm3leon_jax.data.rows.plan import Placement
from cm3leon_jax.tokenizers.text import TextTokenizer
from cm3leon_jax.vocab import VocabLayout


def runs(tokens: np.ndarray, vocab: VocabLayout) -> list[np.ndarray]:
  """Splits the tokens of a sample, [T] int32, into special tokens, texts and images.

  tokens = [</s> 7 8 <break> 91 92 </s>]
  result = [</s>], [7 8], [<break>], [91 92], [</s>]
  """
  kinds = np.where(tokens < vocab.num_special, -1, vocab.is_image(tokens))
  cuts = np.flatnonzero((kinds[1:] != kinds[:-1]) | (kinds[1:] == -1)) + 1
  return np.split(tokens, cuts)


def sample_lines(
  tokens: np.ndarray, owners: Sequence[str], vocab: VocabLayout, tokenizer: TextTokenizer
) -> list[str]:
  """Describes a sample, [T] int32: one line per document, and one per infill.

  `owners` are the names of the documents of all segments, such as "neighbor 1" and "document".
  """
  names, lines, segment, seen = vocab.special_tokens(), [f"{owners[0]}:"], -1, set[int]()
  separators, ended = templates.of(vocab).separators, False
  for run in runs(tokens, vocab):
    token = int(run[0])
    begins, ended = ended and token not in separators, token in separators
    if begins and token not in seen and segment + 1 < len(owners):
      segment += 1
      if segment and owners[segment] != owners[segment - 1]:
        lines.append(f"{owners[segment]}:")
    if vocab.is_mask(token):
      if token in seen:
        lines.append("infill:")
      seen.add(token)
    if vocab.is_image(token):
      lines[-1] += f" <image {len(run)} codes>"
    elif token >= vocab.num_special:
      lines[-1] += f" {tokenizer.decode(run)!r}"
    else:
      lines[-1] += f" {names[token]}"
  return lines


def sample_codes(tokens: np.ndarray, vocab: VocabLayout) -> Iterator[np.ndarray]:
  """Yields the codes of each image of a sample, with moved spans in their original places."""
  if np.count_nonzero(tokens == vocab.mask(0)) != 1:  # Otherwise, <mask:0> has no infill.
    tokens = cm3.undo_cm3_mask(tokens, vocab)
  for run in runs(tokens, vocab):
    if vocab.is_image(int(run[0])):
      yield vocab.image_codes(run)


def describe_row(
  loader: RowLoader, number: int, tokenizer: TextTokenizer
) -> tuple[list[str], list[np.ndarray]]:
  """Describes a row. Returns its lines, and the codes of its images in reading order."""
  loader = loader.of_row(number)
  row, placements, at = loader[number], loader.plan.row(number), 0
  used, length = int((row["segment_ids"] != 0).sum()), len(row["inputs"])
  lines = [f"row {number}: {used} of {length} positions used"]
  codes: list[np.ndarray] = []
  for placement in placements:
    place = slice(at, at + placement.num_positions)
    tokens = np.r_[row["inputs"][at], row["targets"][place]]
    weights, counts = np.unique(row["loss_weights"][place], return_counts=True)
    losses = ", ".join(f"{n} targets of weight {w:g}" for w, n in zip(weights, counts))
    title, owners = _origin(loader, placement)
    lines.append(f"  {title}: positions {at} to {place.stop - 1}, {losses}")
    lines += [f"    {line}" for line in sample_lines(tokens, owners, loader.vocab, tokenizer)]
    codes += sample_codes(tokens, loader.vocab)
    at = place.stop
  return lines, codes


def _origin(loader: RowLoader, placement: Placement) -> tuple[str, list[str]]:
  """Returns the title of a sample, and the names of the documents of its segments."""
  source, pass_, unit = placement[:3]
  spec, plan = loader.plan.sources[source], loader.plan.plan(source, pass_, unit)
  index = loader.plan.units[source].locate(unit)[0]
  document, owners = spec.store[index], []
  for i, j in enumerate(getattr(plan, "neighbors", ())):
    assert spec.bank is not None
    neighbor = spec.bank[int(spec.candidates(index)[j])]
    owners += [f"neighbor {i + 1} {neighbor.key!r}"] * len(neighbor.segments)
  return f"{spec.name} {document.key!r}", owners + ["document"] * len(document.segments)


def contact_sheet(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
  """Places images, each [H, W, 3] uint8, on a white sheet: one line of images per row."""
  height, width = next(image.shape[:2] for images in rows for image in images)
  most = max(map(len, rows))
  sheet = np.full((len(rows) * height, most * width, 3), 255, np.uint8)
  for i, images in enumerate(rows):
    for j, image in enumerate(images):
      sheet[i * height : (i + 1) * height, j * width : (j + 1) * width] = image
  return sheet
