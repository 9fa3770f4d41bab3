"""Converts the text tokenizer of a published model to our ids, which follow the special tokens."""

from collections.abc import Mapping
import json
from typing import Any

from etils import epath
import tokenizers
from tokenizers import pre_tokenizers

from cm3leon_jax.errors import UserError, short
from cm3leon_jax.files.json_files import read_foreign_json
from cm3leon_jax.tokenizers.text import TOKENIZER, types_of, unlike_ours
from cm3leon_jax.vocab import VocabLayout

# Texts that encoding and decoding must not change: spaces, line ends, accents, other scripts, and
# strings that look like special tokens.
PROBES = (
  "a red bell, left of 3 blue keys.",
  "  two spaces\n\n\tlines \r\n end ",
  "naïve cafe\u0301 世界 🙂 ﬁ",
  "</s><break><mask:0><|endoftext|><pad>",
)
# Parts that put a space before each text, and remove it again.
SPACE = {"type": "Prepend", "prepend": " "}
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
NO_SPACE = {
  "type": "Sequence",
  "decoders": [BYTES, {"type": "Strip", "content": " ", "start": 1, "stop": 0}],
}


def read_tokenizer(folder: epath.PathLike, rows: int) -> Mapping[str, Any]:
  """Reads tokenizer.json of a published model.

  `rows` is the number of rows of the model's token table.

  Raises:
    UserError: the file is absent or damaged, is not byte-level BPE, or has tokens without a row.
  """
  path = epath.Path(folder) / TOKENIZER
  if not path.exists():
    raise UserError(
      f"{path} does not exist: write it with transformers, "
      "`AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)`."
    )
  described = read_foreign_json(path, {"model": dict, "added_tokens": list})
  try:
    if damage := _damage(described):
      raise ValueError(damage)
    wrong, largest = _unlike(described), max(tokens_of(described), default=0)
  except (KeyError, TypeError, AttributeError, ValueError) as error:
    raise UserError(f"{path} is damaged ({error}): copy it again.") from error
  if wrong:
    raise UserError(f"{path}: {wrong}; only byte-level BPE, as in OPT and Qwen3, can be imported.")
  if largest >= rows:
    raise UserError(
      f"{path} has the token id {largest}, but the model's token table has {rows} rows: copy both "
      "from the same model."
    )
  return described


def _damage(described: Mapping[str, Any]) -> str:
  """Describes ids, names or patterns that no intact tokenizer has; "" if there are none."""
  vocab, added = described["model"]["vocab"], described["added_tokens"]
  names = {i: name for name, i in vocab.items()}
  for i in (*vocab.values(), *(token["id"] for token in added)):
    if type(i) is not int or i < 0:
      return f"the token id {short(i)} is not a whole number from 0"
  if len(names) < len(vocab):
    return "two tokens of its vocabulary have the same id"
  for token in added:
    name = token["content"]
    if not isinstance(name, str) or not name:
      return f"the added token {token['id']} is {short(name)}; it must be a text"
    if names.setdefault(token["id"], name) != name:
      return f"the id {token['id']} has two names, {short(names[token['id']])} and {short(name)}"
  return ""


def _unlike(described: Mapping[str, Any]) -> str:
  """Describes why `rewrite` cannot preserve the encoding of a tokenizer; "" if it can."""
  model = described["model"]
  for name in ("byte_fallback", "ignore_merges", "dropout"):
    if model.get(name):
      return f"{name} is set"
  for name in ("continuing_subword_prefix", "end_of_word_suffix"):
    if model.get(name):
      return f"it has a {name}"
  lost = [c for c in sorted(pre_tokenizers.ByteLevel.alphabet()) if c not in model["vocab"]]
  if lost:
    return f"it has no token for the byte '{lost[0]}'"
  if types_of(described.get("decoder")) != ["ByteLevel"]:
    return f"its decoder is {types_of(described.get('decoder')) or 'absent'}"
  if "ByteLevel" not in types_of(described.get("pre_tokenizer")):
    return "it does not split text into bytes"
  return unlike_ours(described)


def tokens_of(described: Mapping[str, Any]) -> dict[int, str]:
  """Maps each token id in tokenizer.json to its token, including added tokens."""
  tokens = {int(i): name for name, i in described["model"]["vocab"].items()}
  return tokens | {int(token["id"]): token["content"] for token in described["added_tokens"]}


def rewrite(
  described: Mapping[str, Any], ids: Mapping[int, int], vocab: VocabLayout, spaced: bool = True
) -> tuple[tokenizers.Tokenizer, list[str]]:
  """Converts a published text tokenizer to a vocabulary of this project.

    source = [0: "!", 1: "Ġa", 2: "<|end|>"], ids = {0: n, 1: n + 1, 2: n + 2, 3: n + 3}
    result = [0: "<pad>", ..., n: "!", n + 1: "Ġa", n + 2: "<|end|>", n + 3: "<unused:3>"]

  Merges and the splitting of text do not change. Tokens that the source added to its BPE
  (`<|endoftext|>`, `<think>`) are kept, but no text is encoded to them. A name that is also a
  special token of `vocab` becomes `<source:NAME>`.

  Args:
    ids: the source's id of a text token -> our id, for all ids from `vocab.num_special`. Ids
      without a token are named `<unused:ID>`.
    vocab: layout whose first `num_special` ids, n here, are the special tokens.
    spaced: whether to put a space before each text, as tokenizers of this project do, so that its
      first word has the same token as inside a text. If not, the source's ids do not change.

  Returns:
    The tokenizer, and its differences from the source.

  Raises:
    UserError: the tokenizer changes a text when it encodes and decodes it.
  """
  tokens, special = tokens_of(described), vocab.special_tokens()
  names = {i: f"<source:{s}>" if s in special else s for i, s in tokens.items() if i in ids}
  unused = {i: f"<unused:{i}>" for i in ids if i not in names}
  new = dict(enumerate(special)) | {ids[i]: name for i, name in (names | unused).items()}
  added = [token for token in described["added_tokens"] if token["id"] in ids]
  plain = {*range(vocab.num_special), *(ids[token["id"]] for token in added)}
  options = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
  split = json.loads(json.dumps(described["pre_tokenizer"]))
  kinds = types_of(described.get("normalizer"))
  if spaced:
    _add_no_space(split)
  content = {
    "version": "1.0",
    "added_tokens": [
      {"id": i, "content": new[i], **options, "special": True}
      for i in sorted(plain | {ids[i] for i in unused})
    ],
    "normalizer": None if kinds == ["NFC"] else described.get("normalizer"),
    "pre_tokenizer": split,
    "decoder": described["decoder"],
    "model": {**described["model"], "unk_token": None, "vocab": {s: i for i, s in new.items()}},
  }
  if spaced:
    content |= {"normalizer": SPACE, "decoder": NO_SPACE}
  made = _make(content, vocab)
  typed = [token["content"] for token in added if not token.get("special")]
  such = f", such as {typed[0][:40]}," if typed else ""
  notes = {
    "a space is put before every text": spaced,
    "texts are not normalized to NFC, so decoding returns the original text": "NFC" in kinds,
    f"{len(typed)} added tokens{such} are encoded as plain text": typed,
    f"{len(unused)} rows have no token": unused,
  }
  return made, [note for note, holds in notes.items() if holds]


def _add_no_space(part: dict) -> None:
  """Disables the space that a pre-tokenizer adds, because the normalizer adds one."""
  if part.get("type") == "ByteLevel":
    part["add_prefix_space"] = False
  for inner in part.get("pretokenizers", ()):
    _add_no_space(inner)


def _make(content: Mapping[str, Any], vocab: VocabLayout) -> tokenizers.Tokenizer:
  """Makes the tokenizer of a tokenizer.json.

  Raises:
    UserError: it is damaged, ids are unused, or encoding and decoding changes one of `PROBES`.
  """
  try:
    made = tokenizers.Tokenizer.from_str(json.dumps(content))
  except Exception as error:  # `tokenizers` raises no specific type.
    raise UserError(f"the source's {TOKENIZER} cannot be read ({error}): copy it again.") from error
  made.encode_special_tokens = True
  result = made.get_vocab_size()
  if result != vocab.text_size:
    raise UserError(
      f"the source's {TOKENIZER} has two tokens with the same name or id, so only {result} of "
      f"{vocab.text_size} ids remain: copy it again."
    )
  for text in PROBES:
    ids = made.encode(text, add_special_tokens=False).ids
    if made.decode(ids, skip_special_tokens=True) != text or min(ids) < vocab.num_special:
      raise UserError(
        f"the source's {TOKENIZER} does not decode the ids of {text!r} to the same text, so it "
        "cannot be imported."
      )
  return made
