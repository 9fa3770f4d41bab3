"""Assigns splits by names, so that the split of a record does not depend on other records."""

import hashlib


def fraction(text: str) -> float:
  """Computes a number in [0, 1) from the hash of a text."""
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def split_of(name: str, heldout_fraction: float) -> str:
  """Returns the split of a concept or module. It depends only on the name."""
  return "heldout" if fraction("split:" + name) < heldout_fraction else "train"
