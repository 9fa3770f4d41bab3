"""Defines the byte-level BPE tokenizer, whose ids are the text range of the shared vocabulary."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import functools
import json
from typing import Any, SupportsIndex

from etils import epath
from jaxtyping import Int32
import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from cm3leon_jax.config.tokenizers import TextTokenizerConfig
from cm3leon_jax.errors import UserError, short
from cm3leon_jax.files.atomic import exists
from cm3leon_jax.files.json_files import GET_AGAIN, read_foreign_json, write_json
from cm3leon_jax.stages import stages
from cm3leon_jax.vocab import VocabLayout

# T tokens of one text.

TOKENIZER = "tokenizer.json"
FILES = (TOKENIZER, "tokenizer_config.json", "special_tokens_map.json")
# Types of components that do not lengthen a text by more than a space.
KNOWN = ("Prepend", "NFC", "ByteLevel", "Strip")
# Parts that would change the ids of a text.
UNUSED = {"padding": None, "truncation": None, "post_processor": None}
# Maximum number of characters that describe a part. Qwen3's pre-tokenizer has 350. A compiled
# regular expression takes 200 bytes per character.
LONGEST_PART = 10_000
IMPORTED = "import_weights"  # Command that imports a tokenizer; also the name of an input.


def train_text_tokenizer(
  texts: Iterable[str], vocab: VocabLayout, config: TextTokenizerConfig, folder: epath.PathLike
) -> dict:
  """Trains BPE with exactly `vocab.text_size` ids and writes it in the Hugging Face format.

  Encoding puts a space before a text, so that its first word has the same token as elsewhere.
  Decoding removes this space. Ids [0, `vocab.num_special`) are the special tokens, in the order of
  `vocab.special_tokens()`. Returns {"texts", "characters", "characters_per_token"} of the training
  texts.

  Raises:
    UserError: the texts are too few for `vocab.text_size` ids.
  """
  texts = list(texts)
  tokenizer = _trained(texts, vocab, config)
  characters, size = sum(map(len, texts)), tokenizer.get_vocab_size()
  if size != vocab.text_size:
    raise UserError(
      f"the {len(texts)} training texts ({characters} characters) give {size} tokens, but "
      f"config.vocab.text_size is {vocab.text_size}: use more text, a smaller text_size or a lower "
      "text_tokenizer.min_frequency."
    )
  save_tokenizer(tokenizer, vocab, config, folder)
  tokens = sum(len(ids) for ids in TextTokenizer(folder, vocab).encode_batch(texts))
  return {
    "texts": len(texts),
    "characters": characters,
    "characters_per_token": characters / tokens,
  }


def supported_tokens(texts: Iterable[str], vocab: VocabLayout, config: TextTokenizerConfig) -> int:
  """Returns the largest text_size, at most `vocab.text_size`, for which the texts suffice."""
  return _trained(list(texts), vocab, config).get_vocab_size()


def _trained(
  texts: list[str], vocab: VocabLayout, config: TextTokenizerConfig
) -> tokenizers.Tokenizer:
  """Trains BPE with `vocab.text_size` ids, or fewer if the texts have no more merges."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.normalizer = normalizers.Prepend(" ")
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.Sequence(
    [decoders.ByteLevel(), decoders.Strip(" ", left=1, right=0)]
  )
  trainer = trainers.BpeTrainer(
    vocab_size=vocab.text_size,
    min_frequency=config.min_frequency,
    special_tokens=vocab.special_tokens(),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer, length=len(texts))
  return tokenizer


def save_tokenizer(
  tokenizer: tokenizers.Tokenizer,
  vocab: VocabLayout,
  config: TextTokenizerConfig,
  folder: epath.PathLike,
) -> None:
  """Writes files for `transformers.AutoTokenizer.from_pretrained`. Writes tokenizer.json last."""
  folder, special = epath.Path(folder), vocab.special_tokens()
  roles = {
    "pad_token": special[vocab.pad],
    "bos_token": special[vocab.eos],
    "eos_token": special[vocab.eos],
    "unk_token": special[vocab.unk],
    "additional_special_tokens": special[vocab.brk :],
  }
  about = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": config.model_max_length,
  }
  write_json(folder / "special_tokens_map.json", roles)
  write_json(
    folder / "tokenizer_config.json", {**about, "clean_up_tokenization_spaces": False, **roles}
  )
  (folder / TOKENIZER).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


def unlike_ours(described: Mapping[str, Any]) -> str:
  """Returns why a tokenizer could lengthen texts without bounds; "" if it cannot."""
  if (kind := described["model"].get("type", "BPE")) != "BPE":
    return f"its model is {short(kind)}, not BPE"
  for name in ("normalizer", "decoder", "pre_tokenizer"):
    part = described.get(name)
    others = [kind for kind in types_of(part) if kind not in KNOWN]
    if others and name != "pre_tokenizer":  # Pre-tokenizers only split a text.
      return f"its {name} has the type {short(others[0])}, not {' or '.join(KNOWN)}"
    if (length := len(json.dumps(part))) > LONGEST_PART:
      return f"its {name} has {length:,} characters; the maximum is {LONGEST_PART:,}"
  return ""


def types_of(part: Mapping[str, Any] | None) -> list[str]:
  """Lists the type of a tokenizer's component; for a Sequence, the types of its parts."""
  if part is None:
    return []
  if part.get("type") != "Sequence":
    return [part.get("type", "")]
  names = ("normalizers", "pretokenizers", "decoders")
  return [kind for name in names for one in part.get(name, ()) for kind in types_of(one)]


def copy_files(source: epath.PathLike, folder: epath.PathLike) -> None:
  """Copies the files of a tokenizer. Copies tokenizer.json last.

  Raises:
    UserError: a file is absent.
  """
  for name in reversed(FILES):
    path = epath.Path(source) / name
    if not path.exists():
      raise UserError(f"{path} does not exist: write the text tokenizer in that folder again.")
    (epath.Path(folder) / name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")


def was_imported(folder: epath.PathLike) -> bool:
  """Returns whether the finished stage in `folder` has an imported tokenizer."""
  return stages.command_of(folder) == IMPORTED


class TextTokenizer:
  """Converts texts to ids in [`vocab.num_special`, `vocab.text_size`), and ids to texts.

  `decode(encode(text)) == text` for every text. A special token typed in a text is plain text.
  """

  def __init__(self, folder: epath.PathLike, vocab: VocabLayout):
    """Reads the tokenizer in `folder`.

    Raises:
      UserError: the tokenizer is absent or damaged, or its ids differ from `vocab`.
    """
    path = epath.Path(folder) / TOKENIZER
    if not path.exists():
      raise UserError(
        f"{path} does not exist: run `cm3leon train_text_tokenizer` with the same --workdir first."
      )
    stages.check_files(path)
    is_ours = exists(path.parent / stages.DONE)
    remedy = stages.again(path.parent, path) if is_ours else GET_AGAIN
    described = read_foreign_json(path, {"model": dict}, remedy)
    try:
      if wrong := unlike_ours(described):
        raise ValueError(wrong)
      self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps({**described, **UNUSED}))
    except Exception as error:  # `tokenizers` has no more precise error.
      raise UserError(f"{path} is damaged ({short(str(error))}): {remedy}.") from error
    self._tokenizer.encode_special_tokens = True
    special = [self._tokenizer.id_to_token(i) for i in range(vocab.num_special)]
    if self._tokenizer.get_vocab_size() != vocab.text_size or special != vocab.special_tokens():
      raise UserError(
        f"{path} has {self._tokenizer.get_vocab_size()} tokens and starts with {special[:6]}; "
        f"config.vocab needs {vocab.text_size} tokens that start with the {vocab.num_special} "
        "special tokens."
      )

  @functools.cached_property
  def longest_token(self) -> int:
    """Upper bound for the number of characters of a token: the bytes of the longest token."""
    return max(map(len, self._tokenizer.get_vocab()))

  def encode(self, text: str) -> np.ndarray:
    """Encodes a text without `</s>` at either end; an empty text has no ids.

    Raises:
      UserError: an imported tokenizer's pattern tries too many ways to split the text.
    """
    with _panics_named():
      return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

  def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
    """Encodes many texts on all cores; see `encode`."""
    with _panics_named():
      encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [np.array(e.ids, np.int32) for e in encoded]

  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    """Decodes ids to a text without special tokens."""
    return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


@contextlib.contextmanager
def _panics_named() -> Iterator[None]:
  """Raises UserError if `tokenizers` panics. PanicException is not a subclass of Exception."""
  try:
    yield
  except BaseException as error:
    if type(error).__name__ != "PanicException":
      raise
    raise UserError(
      f"the text tokenizer cannot split a text ({error}): use the tokenizer.json that was "
      "published with its model."
    ) from error


def encode_pieces(
  encode: Callable[[str], np.ndarray], pieces: Sequence[str]
) -> list[Int32[np.ndarray, " _"]]:
  """Encodes the pieces of a text around its holes as if the holes were filled in.

  A space belongs to the next word, so spaces before a hole become part of the hole. A line break
  before a hole is kept; the answer on the next line has the same tokens as after a space.

    ["Answer:", "."]: ids of " Answer:" and of "."
    ["Who?\n", ""]: ids of " Who?\n" and no ids
  """
  first, *others = pieces
  result = [encode(first.rstrip(" "))]
  for i, piece in enumerate(others):
    piece = piece if i == len(others) - 1 else piece.rstrip(" ")
    # The tokenizer adds a space before a text. So that the piece gets no space, put a character
    # before it that never merges with the piece.
    before = "." if piece[:1].isalpha() else "x"
    result.append(encode(before + piece)[len(encode(before)) :])
  return result
