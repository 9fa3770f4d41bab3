"""Parses YAML files into values, and into nodes, which know their lines."""

from typing import Any

import yaml

from cm3leon_jax.config import UserError


def parse(text: str, where: str) -> list[tuple[yaml.Node, Any]]:
  """Parses a text into the (node, value) of each YAML document.

  Raises:
    UserError: the text is not YAML. The message names `where` and the line.
  """
  try:
    nodes = list(yaml.compose_all(text, yaml.SafeLoader))
    return list(zip(nodes, yaml.safe_load_all(text), strict=True))
  except (yaml.YAMLError, ValueError) as error:  # ValueError: a date out of range.
    raise UserError(f"{where} is not valid YAML ({error}).") from error
