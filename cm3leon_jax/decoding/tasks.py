"""From what a user asks for to the request that the model gets, and from what it answers to texts and pictures."""

# I tokens of an image, G tokens that are generated.

from collections.abc import Callable, Sequence
import dataclasses
import math

import numpy as np

from cm3leon_jax.config import UserError
from cm3leon_jax.data.documents import Document
from cm3leon_jax.decoding import grammar, prompts
from cm3leon_jax.decoding.asks import MASK, Ask
from cm3leon_jax.decoding.prompts import Hole, Request
from cm3leon_jax.tokenizers.text import TextTokenizer
from cm3leon_jax.vocab import VocabLayout

TEXT_LENGTH = 64  # Most tokens of text for a hole if nobody says.
EDIT = "Edit first image following the instruction"  # Templates of CM3Leon, table 5.
QUESTION = f"Question: {{}} Answer: {MASK}."


@dataclasses.dataclass(frozen=True)
class Format:
  """What requests are made for.

  Attributes:
    vocab: names the specials.
    image_tokens: I.
    resolution: side of the pictures in pixels.
    positions: longest sample that was trained.
    encode: text -> [T] int32 ids; None: captions come as ids, and no text is written.
    decode: ids -> text; likewise.
  """

  vocab: VocabLayout
  image_tokens: int
  resolution: int
  positions: int
  encode: Callable[[str], np.ndarray] | None = None
  decode: Callable[[Sequence[int]], str] | None = None

  @classmethod
  def of(cls, settings, tokenizer: TextTokenizer | None = None) -> "Format":
    """From a run's settings and its text tokenizer."""
    vqgan, both = settings.vqgan, (tokenizer.encode, tokenizer.decode) if tokenizer else ()
    return cls(
      settings.vocab, vqgan.image_tokens, vqgan.resolution, settings.data.sequence_length, *both
    )

  @property
  def side(self) -> int:
    """Codes in a row of an image."""
    return math.isqrt(self.image_tokens)


def make_request(
  form: Format, ask: Ask, image=None, neighbors: Sequence[Document] = (), caption=None
):
  """The prompts of an ask's streams and the plan of what follows.

  Args:
    form: of the model.
    ask: as `asks.check` takes it.
    image: [I] codes of the given picture; None: there is none, or it is not encoded yet, and zeros stand for it.
    neighbors: best first.
    caption: ids of the prompt, if they are known.

  Returns:
    Request. Raises UserError naming the ask's place: one that takes more positions than were trained, a box that is none, or
    contrastive decoding of what has no unconditional stream.
  """
  try:
    request = _request(
      form, ask, image, [[s.tokens for s in d.segments] for d in neighbors], caption
    )
    longest = grammar.longest(request.plan)
    if request.positions > form.positions:
      raise UserError(
        f"the prompt has {request.positions - longest} tokens and up to {longest} follow; the model was trained on "
        f"{form.positions} positions: shorten the prompt, ask for a smaller length, or retrieve fewer documents."
      )
    draws = any(part.kind in (grammar.CODES, grammar.DOCUMENT) for part in request.plan)
    if draws and ask.sampling.method != "top_p" and len(request.streams) == 1:
      raise UserError(
        f"sampling.method is '{ask.sampling.method}', which draws against a stream without the prompt, and task {ask.task} "
        "without a prompt to draw has one stream: say top_p."
      )
    return request
  except UserError as error:
    raise ask.error(error) from error


def _request(form: Format, ask: Ask, image, near, ids) -> Request:
  vocab, size = form.vocab, form.image_tokens
  ids = form.encode(ask.prompt) if ids is None else ids
  codes = vocab.image_ids(np.zeros(size, np.int32) if image is None else image)
  pictures = [(codes,)] if ask.image else []
  match ask.task:
    case "text_to_image":
      return prompts.text_to_image(vocab, size, ids, near, ask.keep_neighbors)
    case "caption":
      return prompts.infill(
        vocab, size, [(Hole(most_text=ask.length or TEXT_LENGTH),), *pictures], near
      )
    case "question" | "infill_text":
      return prompts.infill(vocab, size, [_with_holes(form, ask), *pictures], near)
    case "infill_image":
      texts = [(ids,)] if ask.prompt.strip() else []
      return prompts.infill(vocab, size, [*texts, _without_box(form, ask, codes)], near)
    case "edit":
      return prompts.edit(vocab, size, form.encode(EDIT), codes, ids)
    case "interleaved":
      texts = [ids] if ask.prompt.strip() else []
      room = form.positions - 1 - sum(map(len, texts))
      return prompts.document(vocab, size, texts, ask.length or max(room, 2))
    case _:
      return prompts.unconditional(vocab, size)


def _with_holes(form: Format, ask: Ask) -> list:
  text = QUESTION.format(ask.prompt.strip()) if ask.task == "question" else ask.prompt
  hole = Hole(most_text=ask.length or TEXT_LENGTH)
  first, *others = text_pieces(form.encode, text)
  return [
    piece
    for piece in (first, *(x for other in others for x in (hole, other)))
    if piece is hole or len(piece)
  ]


def text_pieces(encode: Callable[[str], np.ndarray], text: str) -> list[np.ndarray]:
  """Ids of what stands between the masks of a text, as if they were filled in: a space belongs to the word behind it.

  "a <mask> on it.": ids of " a" and of " on it."
  "Answer: <mask>.": ids of " Answer:" and of "."
  """
  first, *others = text.split(MASK)
  pieces = [encode(first.rstrip())]
  for piece in others:
    piece = piece.rstrip() if piece is not others[-1] else piece
    # The tokenizer puts a space before what it gets; a character that never joins what follows stands there instead.
    before = "." if piece[:1].isalpha() else "x"
    pieces.append(encode(before + piece)[len(encode(before)) :])
  return pieces


def whole_codes(box: Sequence, resolution: int, side: int) -> tuple[int, int, int, int]:
  """A box of pixels, rounded out to whole codes: (left, top, right, bottom) in codes.

    box (3, 0, 9, 4), resolution 16, 8 codes in a row: (1, 0, 5, 2)

  Raises:
    UserError: not four whole numbers, outside of the picture, or empty.
  """
  if len(box) != 4 or not all(isinstance(x, int) and not isinstance(x, bool) for x in box):
    raise UserError(
      f"box is {_listed(box)}; it must be four whole numbers: left, top, right, bottom in pixels."
    )
  left, top, right, bottom = box
  if min(left, top) < 0 or max(right, bottom) > resolution:
    raise UserError(
      f"box is {_listed(box)}; it must lie within the picture, {resolution} x {resolution} pixels."
    )
  if left >= right or top >= bottom:
    raise UserError(
      f"box is {_listed(box)}, which is empty: left must be less than right, and top less than bottom."
    )
  pixels = resolution // side
  return left // pixels, top // pixels, -(-right // pixels), -(-bottom // pixels)


def _listed(box: Sequence) -> str:
  return ",".join(map(str, box))


def _without_box(form: Format, ask: Ask, codes) -> list:
  """Pieces of an image: one hole for a box of full width, else one for each of its rows."""
  side = form.side
  left, top, right, bottom = whole_codes(ask.box, form.resolution, side)
  if right - left == side:
    holes = [(top * side, bottom * side)]
  else:
    holes = [(row * side + left, row * side + right) for row in range(top, bottom)]
  if len(holes) >= form.vocab.num_masks:
    raise UserError(
      f"box is {_listed(ask.box)}: it has {len(holes)} rows of codes, and the vocabulary has sentinels for "
      f"{form.vocab.num_masks - 1}: make it less high, or as wide as the picture."
    )
  pieces, position = [], 0
  for start, stop in holes:
    pieces += [codes[position:start], Hole(codes=stop - start)]
    position = stop
  return [piece for piece in (*pieces, codes[position:]) if isinstance(piece, Hole) or len(piece)]


@dataclasses.dataclass(frozen=True)
class Answer:
  """What came of an ask.

  Attributes:
    segments: texts, and [I] int32 codes of images, in their order: the image of a task that makes one; the caption, the answer,
      or the text with its holes filled; the document.
    filled: the text of every hole.
  """

  segments: tuple
  filled: tuple[str, ...] = ()

  @property
  def images(self) -> list[np.ndarray]:
    return [segment for segment in self.segments if not isinstance(segment, str)]

  @property
  def texts(self) -> list[str]:
    return [segment for segment in self.segments if isinstance(segment, str)]


def read_answer(form: Format, ask: Ask, request: Request, ids: np.ndarray) -> Answer:
  """What [G] generated ids say."""
  vocab = form.vocab
  if ask.task in ("text_to_image", "edit", "unconditional"):
    return Answer((vocab.image_codes(ids[vocab.is_image(ids)]),))
  made = prompts.segments_of(vocab, request, ids)
  read = lambda s: vocab.image_codes(s) if vocab.is_image(s).all() else form.decode(s)
  if ask.task == "interleaved":
    return Answer(tuple(map(read, made)))
  if ask.task == "infill_image":
    return Answer((read(made[-1]),))
  holes = np.split(ids, np.flatnonzero(ids == vocab.eoss))
  filled = tuple(form.decode(hole).strip() for hole in holes if (hole >= vocab.num_special).any())
  return Answer(
    (filled[0] if ask.task == "question" else read(made[-2 if ask.image else -1]),), filled
  )
