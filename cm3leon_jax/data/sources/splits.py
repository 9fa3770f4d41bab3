"""Splits that follow from a name alone, so that no other record changes them."""

import hashlib


def fraction(text: str) -> float:
  """Hashes a text to a number in [0, 1)."""
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def split_of(name: str, heldout_fraction: float) -> str:
  """Returns the split of a concept or module, a function of its name alone."""
  return "heldout" if fraction("split:" + name) < heldout_fraction else "train"
