"""Reads YAML files from untrusted sources. Limits memory and time."""

from typing import Any

from etils import epath
import yaml

from cm3leon_jax.errors import UserError, short
from cm3leon_jax.files.json_files import check_foreign

MOST_BYTES = 2**20  # Maximum file size in bytes. PyYAML takes about 10 seconds for 1 MiB.
# Maximum number of values per file. An alias of a value counts like the value itself.
MOST_VALUES = 2**17


def read(path: epath.PathLike) -> str:
  """Reads a YAML file. Raises UserError if it is not a regular file, too large or not UTF-8."""
  check_foreign(path, MOST_BYTES)
  try:
    return epath.Path(path).read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise UserError(f"{path} is not UTF-8 text ({error}).") from error


def parse(text: str, where: str) -> list[tuple[yaml.Node, Any]]:
  """Parses a text into the (node, value) of each YAML document.

  Raises:
    UserError: the text is not YAML, or has too many values. (A few lines with aliases of aliases
      can make millions of values.) The message names the line if it is known.
  """
  try:
    nodes = list(yaml.compose_all(text, yaml.SafeLoader))
    sizes: dict[int, int] = {}
    if sum(_size(node, sizes) for node in nodes) > MOST_VALUES:
      raise UserError(
        f"{where} has more than {MOST_VALUES:,} values, including the values that aliases "
        "repeat: write fewer values."
      )
    return list(zip(nodes, yaml.safe_load_all(text), strict=True))
  except UserError:
    raise
  except Exception as error:  # PyYAML raises many kinds of errors for wrong tags.
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    where = f"{where}, line {mark.line + 1}," if mark else where
    raise UserError(f"{where} is not valid YAML ({problem or short(str(error))}).") from error


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
  """Counts the values in a node, including the node. An alias counts like its target.

  `sizes` caches results by the id of the node. A node that contains itself exceeds MOST_VALUES.
  """
  if id(node) not in sizes:
    sizes[id(node)] = MOST_VALUES + 1  # Read only for a node that contains itself.
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    inner = [part for pair in pairs for part in pair]
    if isinstance(node, yaml.SequenceNode):
      inner = node.value
    sizes[id(node)] = 1 + sum(_size(part, sizes) for part in inner)
  return sizes[id(node)]
