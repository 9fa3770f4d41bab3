"""The page of `launch.inspect_data`: a ribbon of every row to scale, and its samples in reading order; one HTML file."""

# L slots of a row, H height and W width of a picture, C codes of a picture.

import dataclasses
import re

from etils import epath
import numpy as np

from cm3leon_jax.config import UserError
from cm3leon_jax.data.plan import RowPlan
from cm3leon_jax.io import replacing
from cm3leon_jax.reports.inspect import RowView, SampleView
from cm3leon_jax.reports.report import page_environment, png_uri, show
from cm3leon_jax.reports.ribbon import ribbon
from cm3leon_jax.reports.row_parts import NO_SPAN, Part
from cm3leon_jax.tokenizers.text import TextTokenizer
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from cm3leon_jax.vocab import VocabLayout

SPAN_COLORS = (
  "#c2407c",
  "#7a5bd0",
  "#3c8d4f",
  "#a5820f",
)  # Of <mask:0>, <mask:1>, ..., and around again.
TINT = 0.6  # Share of the span's color in a masked code.
PICTURES_AT_A_TIME = 8
LONG_TEXT = 700  # Characters from which a text scrolls in its box.
MARKS = {" ": "·", "\n": "↵\n", "\t": "⇥\t"}
# White space that tokens carry unseen: at the ends, repeated, other than the plain space; and characters that show nothing.
ODD = re.compile(
  r"^ +| +(?=\n|$)| {2,}|[^\S ]|[\x00-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff\ufffd]"
)


def mark_odd(text: str, opens: bool = True, closes: bool = True) -> list[tuple[bool, str]]:
  """Splits a text into what is read and what is easily overlooked, the latter made visible.

  >>> mark_odd("a cat \\n")
  [(False, 'a cat'), (True, '·'), (True, '↵\\n')]
  >>> mark_odd(" cat"), mark_odd(" cat", opens=False)
  ([(True, '·'), (False, 'cat')], [(False, ' cat')])

  Args:
    text: a piece of a text.
    opens: nothing stands before it; elsewhere one space is not odd.
    closes: the same for its end.
  """
  found, position = [], 0
  for match in ODD.finditer(text):
    inside = (match.start() == 0 and not opens) or (match.end() == len(text) and not closes)
    if match.group() != " " or not inside:
      found.append((False, text[position : match.start()]))
      found.append((True, "".join(MARKS.get(c, f"⟨U+{ord(c):04X}⟩") for c in match.group())))
      position = match.end()
  return [(odd, piece) for odd, piece in [*found, (False, text[position:])] if piece]


def paint(pixels: np.ndarray, spans: np.ndarray, kept: np.ndarray) -> np.ndarray:
  """Shows which codes of a picture are masked, and which are there at all.

  Args:
    pixels: [H, W, 3] uint8, H = W.
    spans: [C] int, the span that a code left for, NO_SPAN if for none: those are tinted in their span's color.
    kept: [C] bool; the others become transparent.

  Returns:
    [H, W, 4] uint8.
  """
  side = int(len(spans) ** 0.5)
  colors = np.array([[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in SPAN_COLORS])
  spread = lambda x: (
    x.reshape(side, side).repeat(len(pixels) // side, 0).repeat(len(pixels) // side, 1)
  )
  spans, kept = spread(spans), spread(kept)
  tinted = (1 - TINT) * pixels + TINT * colors[spans % len(colors)]
  rgb = np.where((spans == NO_SPAN)[..., None], pixels, tinted.round())
  return np.concatenate([rgb, 255 * kept[..., None]], -1).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Decoder:
  """From tokens to what a person reads and sees.

  Attributes:
    image_tokens: C.
    pictures: ids of an image, as bytes -> [H, W, 3] uint8.
  """

  vocab: VocabLayout
  text_tokenizer: TextTokenizer
  image_tokens: int
  pictures: dict[bytes, np.ndarray]

  def text(self, ids: np.ndarray, begins: bool) -> str:
    """Text of ids; the space that every text is encoded with is taken away only where a text `begins`."""
    if begins:
      return self.text_tokenizer.decode(ids)
    return self.text_tokenizer.decode([*self.text_tokenizer.encode("a"), *ids])[1:]

  def name(self, token: int) -> str:
    return self.vocab.special_tokens()[token]

  def codes(self, n: int) -> str:
    return (
      count_of(n, "code")
      if n == self.image_tokens
      else f"{show(n)} of {count_of(self.image_tokens, 'code')}"
    )

  def picture(self, ids: np.ndarray, spans: np.ndarray, kept: np.ndarray) -> str:
    """Data URI of `paint`; ids, spans and kept may be shorter than C: an image whose end was cut off."""
    rest = (0, self.image_tokens - len(ids))
    return png_uri(
      paint(
        self.pictures[ids.tobytes()],
        np.pad(spans, rest, constant_values=NO_SPAN),
        np.pad(kept, rest),
      )
    )


def segment_ids(view: SampleView, segment: list[Part]) -> np.ndarray:
  """Ids of a segment, moved ones at their place."""
  return np.concatenate([view.sample.tokens[part.start : part.stop] for part in segment])


def make_decoder(
  rows: list[RowView],
  vocab: VocabLayout,
  text_tokenizer: TextTokenizer,
  image_tokenizer: ImageTokenizer,
) -> Decoder:
  """Decodes every image of the rows; codes that were cut off are 0. Raises UserError if an image has too many."""
  count, found = image_tokenizer.config.image_tokens, {}
  for view in (view for row in rows for view in row.samples):
    for segment in (s for s in view.segments if s and s[0].kind == "image"):
      ids = segment_ids(view, segment)
      if len(ids) > count:
        raise UserError(
          f"document '{view.origin.document.key}' stands with an image of {len(ids)} codes, the image tokenizer makes {count}: "
          "encode the documents anew."
        )
      found[ids.tobytes()] = np.pad(vocab.image_codes(ids), (0, count - len(ids)))
  pixels = ()
  if found:
    pixels = dataclasses.replace(image_tokenizer, batch_size=PICTURES_AT_A_TIME).decode(
      np.stack(list(found.values()))
    )
  return Decoder(vocab, text_tokenizer, count, dict(zip(found, pixels)))


def text_item(view: SampleView, parts: list[Part], decoder: Decoder, begins: bool) -> dict:
  """Runs of text that follow one another. `begins`: they begin a text, and so with the space that it was encoded with."""
  pieces, tokens = [], 0
  for part in parts:
    ids = view.sample.tokens[part.start : part.stop]
    runs = mark_odd(
      decoder.text(ids, begins and part is parts[0]),
      opens=part is parts[0],
      closes=part is parts[-1],
    )
    name = decoder.name(decoder.vocab.mask(part.span)) if part.moved else ""
    pieces.append({"runs": runs, "span": part.span, "name": name})
    tokens += len(ids)
  characters = sum(len(text) for piece in pieces for _, text in piece["runs"])
  return {
    "kind": "text",
    "pieces": pieces,
    "note": count_of(tokens, "token"),
    "long": characters > LONG_TEXT,
  }


def segment_item(view: SampleView, segment: list[Part], decoder: Decoder) -> dict:
  """A segment at its place, with what is masked there marked. A dropped condition has nothing but its sentinel."""
  if not segment:
    return {"kind": "tag", "name": decoder.name(decoder.vocab.mask(0)), "span": 0}
  if segment[0].kind == "text":
    return text_item(view, segment, decoder, begins=not view.origin.piece)
  spans = np.repeat([p.span for p in segment], [p.stop - p.start for p in segment])
  masked = [
    {"span": int(i), "name": decoder.name(decoder.vocab.mask(int(i))), "codes": int(n)}
    for i, n in zip(*np.unique(spans[spans != NO_SPAN], return_counts=True))
  ]
  picture = decoder.picture(segment_ids(view, segment), spans, np.ones(len(spans), bool))
  return {"kind": "image", "src": picture, "note": decoder.codes(len(spans)), "masked": masked}


def infill_item(view: SampleView, part: Part, decoder: Decoder) -> dict:
  """A moved part as it stands at the end; of an image only its own codes."""
  segment = view.segments[part.segment]
  if part.kind == "text":
    return text_item(view, [part], decoder, begins=part is segment[0] and not view.origin.piece)
  kept = np.repeat([p is part for p in segment], [p.stop - p.start for p in segment])
  picture = decoder.picture(segment_ids(view, segment), np.full(len(kept), NO_SPAN), kept)
  return {"kind": "image", "src": picture, "note": decoder.codes(int(kept.sum())), "masked": []}


def count_of(n: int, noun: str) -> str:
  return f"{show(n)} {noun}{'' if n == 1 else 's'}"


def sample_blocks(view: SampleView, decoder: Decoder) -> list[dict]:
  """A sample in reading order: special tokens between boxes of neighbors, of the document, and of what moved to the end."""
  blocks: list[dict] = []
  seen: set[int] = set()
  tag = lambda part: {
    "kind": "tag",
    "name": decoder.name(int(view.sample.tokens[part.start])),
    "span": part.span,
  }
  for part in (p for p in view.parts if not p.moved):
    owner = view.owners[part.segment]
    if part.kind == "special" and part.span == NO_SPAN:
      is_break = view.sample.tokens[part.start] == decoder.vocab.brk
      within = is_break and view.owners[part.segment + 1 : part.segment + 2] == [owner]
      (blocks[-1]["items"] if within else blocks).append(tag(part))
    elif part.segment not in seen:
      seen.add(part.segment)
      if not blocks or blocks[-1].get("owner") != owner:
        blocks.append(document_box(view, part.segment))
      blocks[-1]["items"].append(segment_item(view, view.segments[part.segment], decoder))
  for part in (p for p in view.parts if p.moved):
    if part.kind == "special" and decoder.vocab.is_mask(int(view.sample.tokens[part.start])):
      title = f"infill, from {view.whose(part.segment)}"
      blocks.append(
        {
          "kind": "box",
          "role": "infill",
          "span": part.span,
          "title": title,
          "facts": [],
          "items": [],
        }
      )
    blocks[-1]["items"].append(
      tag(part) if part.kind == "special" else infill_item(view, part, decoder)
    )
  return blocks


def document_box(view: SampleView, segment: int) -> dict:
  """Head of the neighbor or the document that a segment belongs to."""
  owner = view.owners[segment]
  document, facts, role = view.origin.documents[owner], [], "document"
  if owner < len(view.origin.neighbors):
    found, role = view.origin.neighbors[owner], "neighbor"
    facts.append(f"candidate {found.rank} of {found.candidates}, similarity {found.score:.3f}")
  origin = ", ".join(x for x in (document.license, document.attribution, document.source) if x)
  facts = [fact for fact in (document.key, *facts, origin) if fact]
  return {
    "kind": "box", "role": role, "owner": owner, "span": NO_SPAN, "title": view.whose(segment), "facts": facts, "items": [],
  }  # fmt: skip


def remarks(view: SampleView) -> list[str]:
  """What a person would otherwise have to infer."""
  found, origin = [], view.origin
  if view.dropped:
    found.append(
      "Conditioning dropped: caption and neighbors gave way to <mask:0>, and nothing stands for it at the end."
    )
  elif not origin.neighbors and any(s.is_image for s in origin.document.segments):
    found.append("No neighbors.")
  if origin.whole > len(origin.document.segments[0].tokens):
    stop = origin.piece + len(origin.document.segments[0].tokens)
    found.append(
      f"A piece of a longer text: its tokens {show(origin.piece)} to {show(stop - 1)} of {show(origin.whole)}."
    )
  if view.lacking:
    found.append(f"The row was full: the last {count_of(view.lacking, 'token')} are left out.")
  return found


def sample_context(view: SampleView, decoder: Decoder) -> dict:
  """What the template shows of a sample."""
  sample, document = view.sample, view.origin.document
  weights = [
    f"{show(int(n))} of weight {w:g}"
    for w, n in zip(*np.unique(sample.weights[1:], return_counts=True))
  ]
  facts = [
    ("segment id", show(sample.segment_id)),
    ("slots", f"{show(sample.start)} to {show(sample.start + sample.slots - 1)}"),
    ("positions", f"0 to {show(sample.slots - 1)}"),
    ("tokens", show(len(sample.tokens))),
    ("targets", ", ".join(weights[::-1])),
    ("group", document.group or "none"),
    ("pass", show(view.origin.pass_)),
  ]
  return {
    "key": document.key,
    "segment_id": sample.segment_id,
    "facts": facts,
    "remarks": remarks(view),
    "blocks": sample_blocks(view, decoder),
  }


def fill(rows: list[RowView]) -> float:
  """Share of the rows' slots that are not padding."""
  return sum(v.sample.slots for row in rows for v in row.samples) / sum(
    len(row.loss_weights) for row in rows
  )


def settings_table(plan: RowPlan, rows: list[RowView], split: str) -> list[tuple[str, str]]:
  """(name, value) of what decides how rows look."""
  config = plan.config
  views = [view for row in rows for view in row.samples]
  return [
    ("split", split),
    ("seed", str(plan.seed)),
    ("slots a row", show(config.sequence_length)),
    (
      "mixture",
      ", ".join(f"{source.share:.0%} {source.store.folder.name}" for source in plan.sources),
    ),
    (
      "neighbors",
      f"up to {show(config.num_neighbors)}, {config.neighbor_sampling}; loss weight {config.neighbor_loss_weight:g}",
    ),
    ("without neighbors", f"{config.neighbor_dropout:.0%} of samples"),
    ("conditioning dropped", f"{config.condition_dropout:.0%} of the others"),
    ("CM3 spans", f"{config.mean_spans:g} a sample on average"),
    ("whole segments as spans", f"{config.whole_segment_rate:.0%} of samples"),
    ("samples in these rows", show(len(views))),
    ("slots used in these rows", f"{fill(rows):.1%}"),
    (
      "samples with spans here",
      f"{sum(any(p.moved for p in v.parts) for v in views)} of {len(views)}",
    ),
  ]


def render(
  rows: list[RowView], plan: RowPlan, decoder: Decoder, config_name: str, split: str
) -> str:
  """The page: HTML without any reference to another file."""
  shown = [
    {
      "number": r.number,
      "ribbon": ribbon(r),
      "samples": [sample_context(v, decoder) for v in r.samples],
    }
    for r in rows
  ]
  return (
    page_environment()
    .get_template("inspect.html.jinja")
    .render(
      rows=shown,
      settings=settings_table(plan, rows, split),
      config_name=config_name,
      span_colors=SPAN_COLORS,
      samples=sum(len(row.samples) for row in rows),
    )
  )


def check_writable(out: epath.PathLike) -> None:
  """Makes the folder of `out`. Raises UserError if a file cannot be written there."""
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
      f"--out is {out}, which cannot be written ({error.strerror}: {error.filename}): name a file in a folder of yours."
    ) from error


def write(out: epath.PathLike, html: str) -> None:
  """Writes the page, see `io.replacing`."""
  with replacing(out, "w") as file:
    file.write(html)
