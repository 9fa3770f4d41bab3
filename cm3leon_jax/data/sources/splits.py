"""Assigns splits by name only, so that other records do not change the split of a record."""

import hashlib


def fraction(text: str) -> float:
  """Hashes a text to a number in [0, 1)."""
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def split_of(name: str, heldout_fraction: float) -> str:
  """Returns the split of a concept or module, which depends only on its name."""
  return "heldout" if fraction("split:" + name) < heldout_fraction else "train"
