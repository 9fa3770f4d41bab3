"""Renumbers the vocabulary of Chameleon (2405.09818), whose ids are a permutation of ours.

The names of the ids decide, and never an assumed order.
"""

# V ids of the vocabulary.

from collections.abc import Mapping
import re
from typing import Any

from etils import epath
from jaxtyping import Int32
import numpy as np

from cm3leon_jax.errors import UserError, short
from cm3leon_jax.importing.source import CONFIG, SourceCheckpoint
from cm3leon_jax.importing.tokenizer import tokens_of
from cm3leon_jax.vocab import VocabLayout

MAP = "vocabulary_map"  # Field of config.json: name -> id.
# Names of our ids 0 to 4: <pad>; the start of a sample; <unk>; the begin of an image; the end of a
# turn. Our last special token is the end of an image.
NAMED = ("<pad>", "<s>", "<unk>", "<racm3:break>", "<reserved08706>")
IMAGE_END = "<eoss>"
RESERVED = re.compile(r"<(reserved|sentinel:)\d+>")  # Names that our `<mask:i>` take.
IMAGE = "IMGIMG"
CODE = re.compile(IMAGE + "([A-J]+).", re.DOTALL)
DIGITS = str.maketrans("ABCDEFGHIJ", "0123456789")


def read_names(source: SourceCheckpoint, tokenizer: Mapping[str, Any]) -> dict[str, int]:
  """Returns name -> id, from the field `MAP` of config.json and the content of tokenizer.json.

  Raises:
    UserError: the two files differ, or the names are not those of all ids, each with one name.
  """
  path, result = source.folder / CONFIG, dict(source.part(MAP, dict))
  if not result:
    raise UserError(f"{path} has no {MAP}: transformers writes it for every Chameleon.")
  for i, name in tokens_of(tokenizer).items():
    if result.setdefault(name, i) != i:
      raise UserError(
        f"{path}: {MAP} has the id {short(result[name])} for {short(name)}, but tokenizer.json has "
        f"{i}: copy both files from the same model."
      )
  names: dict[int, str] = {}
  rows = source.size("vocab_size", 0)
  for name, i in result.items():
    if type(i) is not int or not 0 <= i < rows:
      raise UserError(f"{path}: the id of {short(name)} is {short(i)}; ids are below {rows:,}.")
    if (other := names.setdefault(i, name)) != name:
      raise UserError(f"{path}: the id {i} has two names, {short(other)} and {short(name)}.")
  if len(names) < rows:
    lost = next(i for i in range(rows) if i not in names)
    raise UserError(f"{path}: {MAP} has no name for the id {lost}, but vocab_size is {rows:,}.")
  return result


def image_ids(names: Mapping[str, int], path: epath.PathLike) -> list[int]:
  """Returns the id of each image code.

    {"!": 0, "IMGIMGAZ": 4, "IMGIMGBZ": 6, "IMGIMGBAZ": 9, ...}: code 0 is 4, 1 is 6, 10 is 9

  Chameleon's code finds codes of ids by the names, and ids of codes by pairing two sorted lists.

  Raises:
    UserError: these two ways differ, or a code has no name or two names.
  """
  codes: dict[int, str] = {}
  for name in names:
    if not name.startswith(IMAGE):
      continue
    if not (match := CODE.fullmatch(name)):
      raise UserError(f"{path}: {short(name)} names no image code, which letters A to J encode.")
    code = int(match[1].translate(DIGITS))
    if (other := codes.setdefault(code, name)) != name:
      raise UserError(f"{path}: {short(other)} and {short(name)} both name the image code {code}.")
  if not codes:
    raise UserError(f"{path}: {MAP} names no image codes, such as {IMAGE}AZ.")
  if lost := sorted({*range(max(codes))} - {*codes}):
    raise UserError(f"{path}: {MAP} has no name for the image code {lost[0]}.")
  result = [names[codes[code]] for code in range(len(codes))]
  if result != sorted(result):
    code = next(i for i, (a, b) in enumerate(zip(result, sorted(result))) if a != b)
    raise UserError(
      f"{path}: the image code {code} has the id {result[code]} by its name, but "
      f"{sorted(result)[code]} by the order of ids, and Chameleon's code uses both."
    )
  return result


def permutation(
  names: Mapping[str, int], vocab: VocabLayout, path: epath.PathLike
) -> Int32[np.ndarray, " V"]:
  """Returns the source's id of each of our ids.

  The ids of `NAMED` are 0 to 4. The first reserved ids become `<mask:i>`, and `IMAGE_END` our last
  special token. All other ids of text follow in their order, then the image codes.

  Args:
    names: result of `read_names`.
    vocab: layout of as many ids, with the template chameleon.
    path: file with the names, for messages.

  Raises:
    UserError: a special token has no id, or the errors of `image_ids`.
  """
  if lost := [name for name in (*NAMED, IMAGE_END) if name not in names]:
    raise UserError(f"{path}: {MAP} has no '{lost[0]}', a special token of Chameleon.")
  codes, first = image_ids(names, path), [names[name] for name in NAMED]
  reserved = sorted(i for name, i in names.items() if RESERVED.fullmatch(name) and i not in first)
  if (lack := vocab.num_masks - len(reserved)) > 0:
    raise UserError(
      f"{path}: {MAP} has too few reserved names for the sentinels <mask:i>: add "
      f"--config.vocab.num_special={vocab.num_special - lack}."
    )
  special = [*first, *reserved[: vocab.num_masks], names[IMAGE_END]]
  others = sorted({*names.values()} - {*special} - {*codes})
  return np.array([*special, *others, *codes], np.int32)
