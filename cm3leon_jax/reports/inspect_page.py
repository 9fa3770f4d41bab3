"""Renders training rows as one HTML page: a ribbon per row, and its samples in reading order."""

# L positions of a row, H height and W width of an image, C codes of an image.

from collections.abc import Sequence
import dataclasses
import re
from typing import Any

from etils import epath
import numpy as np

from cm3leon_jax.config import UserError
from cm3leon_jax.data.rows.plan import RowPlan
from cm3leon_jax.reports.report import page_environment, png_uri, show
from cm3leon_jax.reports.ribbon import ribbon
from cm3leon_jax.reports.row_contents import RowView, SampleView
from cm3leon_jax.reports.row_parts import NO_SPAN, RowPart
from cm3leon_jax.tokenizers.text import TextTokenizer
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from cm3leon_jax.vocab import VocabLayout

# Colors of the spans <mask:0>, <mask:1>, ...; after the last color, the first follows again.
SPAN_COLORS = ("#c2407c", "#7a5bd0", "#3c8d4f", "#a5820f")
TINT = 0.6  # Share of the span's color in the pixels of a masked code.
DECODE_BATCH = 8
LONG_TEXT = 700  # A text with more characters than this scrolls in its box.
MARKS = {" ": "·", "\n": "↵\n", "\t": "⇥\t"}
# Matches white space at an end of a text, repeated white space, white space that is not a plain
# space, and invisible characters.
ODD = re.compile(
  r"^ +| +(?=\n|$)| {2,}|[^\S ]"
  r"|[\x00-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff\ufffd]"
)


def mark_odd(text: str, opens: bool = True, closes: bool = True) -> list[tuple[bool, str]]:
  """Splits a text into pieces (whether it is odd, text) and makes odd characters visible.

  >>> mark_odd("a cat \\n")
  [(False, 'a cat'), (True, '·'), (True, '↵\\n')]
  >>> mark_odd(" cat"), mark_odd(" cat", opens=False)
  ([(True, '·'), (False, 'cat')], [(False, ' cat')])

  Args:
    opens: whether `text` is the start of the whole text. If not, one leading space is not odd.
    closes: whether `text` is the end of the whole text. If not, one trailing space is not odd.
  """
  result, position = [], 0
  for match in ODD.finditer(text):
    inside = (match.start() == 0 and not opens) or (match.end() == len(text) and not closes)
    if match.group() != " " or not inside:
      result.append((False, text[position : match.start()]))
      result.append((True, "".join(MARKS.get(c, f"⟨U+{ord(c):04X}⟩") for c in match.group())))
      position = match.end()
  return [(odd, piece) for odd, piece in [*result, (False, text[position:])] if piece]


def paint(pixels: np.ndarray, spans: np.ndarray, kept: np.ndarray) -> np.ndarray:
  """Tints the masked codes of an image and hides its absent codes.

  Args:
    pixels: [H, W, 3] uint8, H = W.
    spans: [C] int, the span of each masked code; NO_SPAN for other codes. A span selects a color.
    kept: [C] bool. Codes that are not kept become transparent.

  Returns:
    [H, W, 4] uint8.
  """
  colors = np.array([[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in SPAN_COLORS])
  spans, kept = _to_pixels(spans, len(pixels)), _to_pixels(kept, len(pixels))
  tinted = (1 - TINT) * pixels + TINT * colors[spans % len(colors)]
  rgb = np.where((spans == NO_SPAN)[..., None], pixels, tinted.round())
  return np.concatenate([rgb, 255 * kept[..., None]], -1).astype(np.uint8)


def _to_pixels(codes: np.ndarray, height: int) -> np.ndarray:
  """Repeats the value of each code over its pixels: [C] -> [height, height]."""
  side = int(len(codes) ** 0.5)
  return codes.reshape(side, side).repeat(height // side, 0).repeat(height // side, 1)


@dataclasses.dataclass(frozen=True)
class PageDecoder:
  """Decodes token ids. `images` maps an image's ids as bytes to its pixels, [H, W, 3] uint8."""

  vocab: VocabLayout
  text_tokenizer: TextTokenizer
  image_tokens: int
  images: dict[bytes, np.ndarray]

  def text(self, ids: np.ndarray, begins: bool) -> str:
    """Decodes ids of a text. If they `begin` the text, removes its leading space."""
    if begins:
      return self.text_tokenizer.decode(ids)
    return self.text_tokenizer.decode([*self.text_tokenizer.encode("a"), *ids])[1:]

  def name(self, token: int) -> str:
    """Returns the name of a special token."""
    return self.vocab.special_tokens()[token]

  def mask_name(self, span: int) -> str:
    """Returns the name of the sentinel of a span."""
    return self.name(self.vocab.mask(span))

  def codes(self, n: int) -> str:
    """Returns `16 codes` for a whole image of 16 codes, and `4 of 16 codes` for a part of it."""
    whole = count_of(self.image_tokens, "code")
    return whole if n == self.image_tokens else f"{show(n)} of {whole}"

  def image_uri(self, ids: np.ndarray, spans: np.ndarray, kept: np.ndarray) -> str:
    """Returns the data URI of the painted image. A cut-off image may lack its last codes."""
    rest = (0, self.image_tokens - len(ids))
    spans, kept = np.pad(spans, rest, constant_values=NO_SPAN), np.pad(kept, rest)
    return png_uri(paint(self.images[ids.tobytes()], spans, kept))


def segment_ids(view: SampleView, segment: list[RowPart]) -> np.ndarray:
  """Returns the token ids of a segment, with moved spans in their original places."""
  return np.concatenate([view.sample.tokens[part.start : part.stop] for part in segment])


def make_decoder(
  rows: list[RowView],
  vocab: VocabLayout,
  text_tokenizer: TextTokenizer,
  image_tokenizer: ImageTokenizer,
) -> PageDecoder:
  """Decodes all images of the rows. The missing codes of an image that was cut off become 0.

  Raises:
    UserError: an image has more codes than the image tokenizer uses per image.
  """
  count = image_tokenizer.config.image_tokens
  codes: dict[bytes, np.ndarray] = {}
  pixels: Sequence[np.ndarray] | np.ndarray = ()
  for view in (view for row in rows for view in row.samples):
    for segment in (s for s in view.segments if s and s[0].kind == "image"):
      ids = segment_ids(view, segment)
      if len(ids) > count:
        raise UserError(
          f"document '{view.origin.document.key}' has an image of {len(ids)} codes, but images of "
          f"the image tokenizer have {count}: encode the documents again."
        )
      codes[ids.tobytes()] = np.pad(vocab.image_codes(ids), (0, count - len(ids)))
  if codes:
    tokenizer = dataclasses.replace(image_tokenizer, batch_size=DECODE_BATCH)
    pixels = tokenizer.decode(np.stack(list(codes.values())))
  return PageDecoder(vocab, text_tokenizer, count, dict(zip(codes, pixels)))


def text_item(view: SampleView, parts: list[RowPart], decoder: PageDecoder, begins: bool) -> dict:
  """Returns the page item that shows consecutive text parts. `begins`: see `PageDecoder.text`."""
  pieces: list[dict[str, Any]] = []
  tokens = 0
  for part in parts:
    ids = view.sample.tokens[part.start : part.stop]
    is_first, is_last = part is parts[0], part is parts[-1]
    runs = mark_odd(decoder.text(ids, begins and is_first), opens=is_first, closes=is_last)
    name = decoder.mask_name(part.span) if part.moved else ""
    pieces.append({"runs": runs, "span": part.span, "name": name})
    tokens += len(ids)
  characters = sum(len(text) for piece in pieces for _, text in piece["runs"])
  note, is_long = count_of(tokens, "token"), characters > LONG_TEXT
  target = is_target(view, parts[-1])
  return {"kind": "text", "pieces": pieces, "note": note, "long": is_long, "target": target}


def is_target(view: SampleView, part: RowPart) -> bool:
  """Returns whether a part of a sample belongs to the target of an instruction."""
  return view.target is not None and view.target[0] <= part.start < view.target[1]


def segment_item(view: SampleView, segment: list[RowPart], decoder: PageDecoder) -> dict:
  """Returns the page item of a segment with its masked parts, or a sentinel if it was dropped."""
  if not segment:
    return {"kind": "tag", "name": decoder.mask_name(0), "span": 0}
  if segment[0].kind == "text":
    return text_item(view, segment, decoder, begins=not view.origin.piece_start)
  spans = np.repeat([p.span for p in segment], [p.stop - p.start for p in segment])
  masked = [
    {"span": int(i), "name": decoder.mask_name(int(i)), "codes": int(n)}
    for i, n in zip(*np.unique(spans[spans != NO_SPAN], return_counts=True))
  ]
  uri = decoder.image_uri(segment_ids(view, segment), spans, np.ones(len(spans), bool))
  item = {"kind": "image", "src": uri, "note": decoder.codes(len(spans)), "masked": masked}
  return {**item, "target": is_target(view, segment[0])}


def infill_item(view: SampleView, part: RowPart, decoder: PageDecoder) -> dict:
  """Returns the page item of a part that was moved to the end. Images show only its codes."""
  segment = view.segments[part.segment]
  if part.kind == "text":
    begins = part is segment[0] and not view.origin.piece_start
    return text_item(view, [part], decoder, begins)
  kept = np.repeat([p is part for p in segment], [p.stop - p.start for p in segment])
  uri = decoder.image_uri(segment_ids(view, segment), np.full(len(kept), NO_SPAN), kept)
  item = {"kind": "image", "src": uri, "note": decoder.codes(int(kept.sum())), "masked": []}
  return {**item, "target": is_target(view, part)}


def count_of(n: int, noun: str) -> str:
  """Formats a count: `1 code`, `2 codes`."""
  return f"{show(n)} {noun}{'' if n == 1 else 's'}"


def sample_blocks(view: SampleView, decoder: PageDecoder) -> list[dict]:
  """Returns the blocks of a sample in reading order.

  A block is a box, which shows a neighbor, the document or an infill, or a special token between
  two boxes.
  """
  blocks: list[dict] = []
  seen: set[int] = set()
  for part in view.parts:
    token, is_special = int(view.sample.tokens[part.start]), part.kind == "special"
    tag = {"kind": "tag", "name": decoder.name(token), "span": part.span} if is_special else {}
    owner = view.owners[part.segment]
    if part.moved:
      if is_special and decoder.vocab.is_mask(token):
        what = "infill" if view.origin.task is None else "target"
        title = f"{what}, from {view.owner_name(part.segment)}"
        blocks.append(_box("infill", title, part.span))
      blocks[-1]["items"].append(tag or infill_item(view, part, decoder))
    elif is_special and part.span == NO_SPAN:
      next_owner = view.owners[part.segment + 1 : part.segment + 2]
      within = token == decoder.vocab.brk and next_owner == [owner]
      (blocks[-1]["items"] if within else blocks).append(tag)
    elif part.segment not in seen:
      seen.add(part.segment)
      if not blocks or blocks[-1].get("owner") != owner:
        blocks.append(document_box(view, part.segment))
      blocks[-1]["items"].append(segment_item(view, view.segments[part.segment], decoder))
  return blocks


def _box(role: str, title: str, span: int = NO_SPAN, **fields: Any) -> dict[str, Any]:
  box = {"kind": "box", "role": role, "title": title, "span": span, "facts": [], "items": []}
  return box | fields


def document_box(view: SampleView, segment: int) -> dict:
  """Returns an empty box for the neighbor or document that a segment belongs to."""
  owner = view.owners[segment]
  document, facts, role = view.origin.documents[owner], [], "document"
  if owner < len(view.origin.neighbors):
    neighbor, role = view.origin.neighbors[owner], "neighbor"
    rank = f"candidate {neighbor.rank} of {neighbor.candidates}"
    facts.append(f"{rank}, similarity {neighbor.score:.3f}")
  source = ", ".join(x for x in (document.license, document.attribution, document.source) if x)
  facts = [fact for fact in (document.key, *facts, source) if fact]
  return _box(role, view.owner_name(segment), owner=owner, facts=facts)


def remarks(view: SampleView, decoder: PageDecoder) -> list[str]:
  """Returns facts about a sample that the blocks of the sample do not show."""
  result, origin = [], view.origin
  if origin.task is not None:
    if view.dropped:
      return ["Everything before the target dropped: <mask:0> replaces it, and no infill follows."]
    left_out = [origin.document.segments[i].tokens for i in origin.task.left_out(origin.document)]
    texts = [decoder.text(tokens, begins=True) for tokens in left_out]
    return [f"Instruction dropped: “{text}” is omitted." for text in texts]
  tokens = len(origin.document.segments[0].tokens)
  if view.dropped:
    result.append(
      "Conditioning dropped: <mask:0> replaces caption and neighbors, and no infill follows."
    )
  elif not origin.neighbors and any(s.is_image for s in origin.document.segments):
    result.append("No neighbors.")
  if origin.text_length > tokens:
    stop = show(origin.piece_start + tokens - 1)
    start, length = show(origin.piece_start), show(origin.text_length)
    result.append(f"Piece of a longer text: tokens {start} to {stop} of {length}.")
  if view.missing:
    result.append(f"The row was full: the last {count_of(view.missing, 'token')} were cut off.")
  return result


def sample_context(view: SampleView, decoder: PageDecoder) -> dict:
  """Returns what the page's template shows of a sample."""
  sample, document = view.sample, view.origin.document
  weights = [
    f"{show(int(n))} of weight {w:g}"
    for w, n in zip(*np.unique(sample.weights[1:], return_counts=True))
  ]
  stop = sample.start + sample.num_positions
  first, last = int(sample.positions.min()), int(sample.positions.max())
  task = view.origin.task
  facts = [
    *([("task", task.name)] if task else []),
    ("segment id", show(sample.segment_id)),
    ("positions in the row", f"{show(sample.start)} to {show(stop - 1)}"),
    ("positions in the sample", f"{show(first)} to {show(last)}"),
    ("tokens", show(len(sample.tokens))),
    ("targets", ", ".join(weights[::-1])),
    ("group", document.group or "none"),
    ("pass", show(view.origin.pass_)),
  ]
  return {
    "key": document.key,
    "segment_id": sample.segment_id,
    "facts": facts,
    "remarks": remarks(view, decoder),
    "blocks": sample_blocks(view, decoder),
  }


def fill(rows: list[RowView]) -> float:
  """Returns the share of the rows' positions that are not padding."""
  used = sum(view.sample.num_positions for row in rows for view in row.samples)
  return used / sum(len(row.loss_weights) for row in rows)


def render(
  rows: list[RowView], plan: RowPlan, decoder: PageDecoder, config_name: str, split: str
) -> str:
  """Renders the page as self-contained HTML."""
  views = [view for row in rows for view in row.samples]
  shown = [
    {
      "number": row.number,
      "ribbon": ribbon(row),
      "samples": [sample_context(view, decoder) for view in row.samples],
    }
    for row in rows
  ]
  template = page_environment().get_template("inspect.html.jinja")
  return template.render(
    rows=shown,
    plan=plan,
    split=split,
    config_name=config_name,
    span_colors=SPAN_COLORS,
    samples=len(views),
    instructions=[view for view in views if view.origin.task],
    samples_with_spans=sum(any(part.moved for part in view.parts) for view in views),
    fill=fill(rows),
  )


def check_writable(out: epath.PathLike) -> None:
  """Creates the folder of `out` and checks that a file can be written there.

  Raises:
    UserError: `out` is a folder or cannot be written.
  """
  out = epath.Path(out)
  if out.is_dir():
    raise UserError(f"--out is {out}, a folder; it must be a file in it, e.g. {out / 'rows.html'}.")
  try:
    out.parent.mkdir(parents=True, exist_ok=True)
    probe = out.parent / f"{out.name}.probe"
    probe.write_text("")
    probe.unlink()
  except OSError as error:
    raise UserError(
      f"--out is {out}, which cannot be written ({error.strerror}: {error.filename}): "
      "name a file in a writable folder."
    ) from error
