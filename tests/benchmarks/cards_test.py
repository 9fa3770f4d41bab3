"""Tests of the config cards: the pages are those of the numbers, and a sample still holds."""

import pytest

from benchmarks import cards

STORED = [card for card in cards.CARDS if card.name in cards.stored(card.size)]
# The first of each program; they compile in a few minutes together.
SAMPLE = list({card.program: card for card in reversed(STORED)}.values())


@pytest.mark.parametrize("size", cards.SIZES)
def test_the_page_shows_every_card_that_is_stored(size):
  stored = cards.stored(size)
  page = (cards.FOLDER / f"cm3leon_{size}.md").read_text()
  assert page == cards.page(size, stored), "python -m benchmarks.cards writes the pages"
  for card in cards.CARDS:
    if card.size == size and card.name in stored:
      assert stored[card.name]["command"] == " ".join(card.command), card.name
      assert stored[card.name]["sum_gib"] < stored[card.name]["hbm_gib"], card.name


def test_there_is_a_card_of_each_size_slice_and_program():
  assert len(cards.CARDS) == len({(c.size, c.name) for c in cards.CARDS}) == 3 * 4 * 3
  assert STORED == cards.CARDS
  assert {card.program for card in SAMPLE} == set(cards.PROGRAMS)


def test_drift_is_the_relative_change_of_each_number():
  old = {"arguments_gib": 2.0, "temporaries_gib": 4.0, "flops": 8.0}
  old["collectives"] = {"all-gather": {"count": 1, "bytes": 100}}
  new = {**old, "flops": 10.0, "collectives": {"all-reduce": {"count": 1, "bytes": 5}}}
  assert cards.drift(old, old) == {}
  assert cards.drift(old, new) == {"flops": 0.2, "all-gather": 1.0, "all-reduce": 1.0}


@pytest.mark.slow
@pytest.mark.tpu_backend
@pytest.mark.parametrize("card", SAMPLE, ids=str)
def test_the_numbers_of_a_card_are_those_of_this_code(card, monkeypatch):
  pytest.importorskip("libtpu")
  monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")  # The plans are of optimized programs.
  changes = cards.drift(cards.stored(card.size)[card.name], cards.measure(card))
  assert not {number: change for number, change in changes.items() if change > 0.01}
