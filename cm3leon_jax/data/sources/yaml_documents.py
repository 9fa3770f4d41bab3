"""Reads YAML files of strangers, within bounds of memory and time."""

from typing import Any

from etils import epath
import yaml

from cm3leon_jax.config import UserError, short
from cm3leon_jax.files.json_files import check_foreign

MOST_BYTES = 2**20  # Of a file: PyYAML takes about 10 seconds to read 1 MiB.
MOST_VALUES = 2**17  # Of a file, one for each time that an alias names it.


def read(path: epath.PathLike) -> str:
  """Returns the text of a file.

  Raises:
    UserError: it is no regular file, larger than MOST_BYTES, or no UTF-8.
  """
  check_foreign(path, MOST_BYTES)
  try:
    return epath.Path(path).read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise UserError(f"{path} is not UTF-8 text ({error}).") from error


def parse(text: str, where: str) -> list[tuple[yaml.Node, Any]]:
  """Returns node and value of each document of a text.

  Raises:
    UserError: naming the line: no YAML, or too many values. A few lines of aliases of aliases make
      millions of them.
  """
  try:
    nodes = list(yaml.compose_all(text, yaml.SafeLoader))
    _check_size(nodes, where)
    return list(zip(nodes, yaml.safe_load_all(text), strict=True))
  except UserError:
    raise
  except Exception as error:  # PyYAML raises errors of any kind at values that a tag cannot have.
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    where = f"{where}, line {mark.line + 1}," if mark else where
    raise UserError(f"{where} is not valid YAML ({problem or short(str(error))}).") from error


def _check_size(nodes: list[yaml.Node], where: str) -> None:
  """Raises UserError at documents of more than `MOST_VALUES`, or one that contains itself."""
  sizes: dict[int, int] = {}
  total = sum(_size(node, sizes) for node in nodes)
  if total > MOST_VALUES:
    raise UserError(
      f"{where} has more than {MOST_VALUES:,} values, because aliases repeat what they name: write "
      "fewer."
    )


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
  """Returns the number of values of a node, itself included; aliases count as what they name.

  Args:
    node: may be shared.
    sizes: of the nodes that were counted, by their ids; of one that contains itself too many.
  """
  if id(node) not in sizes:
    sizes[id(node)] = MOST_VALUES + 1  # Until it is known, only a node within itself meets it.
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    inner = [part for pair in pairs for part in pair]
    if isinstance(node, yaml.SequenceNode):
      inner = node.value
    sizes[id(node)] = 1 + sum(_size(part, sizes) for part in inner)
  return sizes[id(node)]
