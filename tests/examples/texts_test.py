import itertools

import pytest

from examples.illustrations import texts as docstrings

PROSE = "Reads a file line by line and gives every line as text without its end."


def test_prose_keeps_sentences_and_leaves_out_the_rest():
  docstring = f"""{PROSE}

  See also the class :class:`~io.TextIOBase` and the function `open`, which this one builds upon.

  >>> read_lines("a")

  Args:
    path: of the file.

  - A list item that is long enough to count as a text but is no sentence.

  Too short."""
  assert docstrings.prose(docstring) == [
    f"{PROSE}\nSee also the class io.TextIOBase and the function open, which this one builds upon."
  ]


def test_prose_unwraps_lines_and_splits_what_is_too_long():
  assert docstrings.prose(PROSE.replace(" line ", "\n  line ", 1)) == [PROSE]
  texts = docstrings.prose("\n\n".join([PROSE] * 50))
  assert len(texts) > 1
  assert all(docstrings.MIN_CHARS <= len(text) <= docstrings.MAX_CHARS for text in texts)
  assert "\n".join(texts) == "\n".join([PROSE] * 50)
  assert docstrings.prose(f"{PROSE} " * 50) == []


@pytest.mark.slow
def test_pieces_are_deterministic_distinct_and_attributed():
  pieces = list(docstrings.pieces(60))
  assert list(docstrings.pieces(20)) == pieces[:20]
  assert list(docstrings.pieces(0)) == []
  assert len({p.text.lower() for p in pieces}) == len({p.key for p in pieces}) == 60
  assert all(p.module.source and p.module.license and p.module.attribution for p in pieces)
  assert len(list(itertools.groupby(pieces, lambda p: p.module.name))) > 5
