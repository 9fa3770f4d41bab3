"""Tests that the numbers on the pages of the config cards are the stored numbers.

`python -m benchmarks.cards --check` compiles the configs again and compares the results.
"""

import pytest

from benchmarks import cards

STORED = [card for card in cards.CARDS if card.name in cards.stored(card.size)]


@pytest.mark.parametrize("size", cards.SIZES)
def test_the_page_shows_every_card_that_is_stored(size):
  stored = cards.stored(size)
  page = (cards.FOLDER / f"cm3leon_{size}.md").read_text()
  assert page == cards.page(size, stored), "the page is outdated: run python -m benchmarks.cards"
  for card in cards.CARDS:
    if card.size == size and card.name in stored:
      assert stored[card.name]["command"] == " ".join(card.command), card.name
      assert stored[card.name]["sum_gib"] < stored[card.name]["hbm_gib"], card.name


def test_there_is_a_card_of_each_size_slice_and_program():
  number = len(cards.SIZES) * len(cards.SLICES) * len(cards.PROGRAMS) - len(cards.NOT_PRINTED)
  number += len(cards.ADAPTED)
  assert len(cards.CARDS) == len({(c.size, c.name) for c in cards.CARDS}) == number == 46
  assert STORED == cards.CARDS


def test_only_the_7b_has_cards_of_adapters():
  """Their program is a train step, and only these cards have a rank."""
  adapted = [card for card in cards.CARDS if card.program == "adapters"]
  assert [(card.size, card.where) for card in adapted] == [("7b", "v5e-16"), ("7b", "v5p-8")]
  ranked = [c for c in cards.CARDS if any("adapter.rank" in flag for flag in c.command)]
  assert ranked == adapted
  assert all("--program=train" in card.command for card in adapted)
  assert ["- **adapters**" in cards.page(size, {}) for size in cards.SIZES] == [True, False, False]


def test_drift_is_the_relative_change_of_each_number():
  old = {"arguments_gib": 2.0, "temporaries_gib": 4.0, "flops": 8.0}
  old["collectives"] = {"all-gather": {"count": 1, "bytes": 100}}
  new = {**old, "flops": 10.0, "collectives": {"all-reduce": {"count": 1, "bytes": 5}}}
  assert cards.drift(old, old) == {}
  changed = [f"{name}, {x}" for name in ("all-gather", "all-reduce") for x in ("count", "bytes")]
  assert cards.drift(old, new) == {"flops": 0.2, **dict.fromkeys(changed, 1.0)}


class TestCheck:
  @pytest.fixture
  def measured(self, monkeypatch):
    """Fakes compilation: returns the numbers that it finds, and the names of the compiled cards."""
    card = STORED[0]
    old = cards.stored(card.size)[card.name]
    new, names = {**old}, []
    monkeypatch.setattr(cards, "compiler", lambda: old["compiler"])
    monkeypatch.setattr(cards, "measure", lambda card: names.append(card.name) or new)
    return new, names

  def test_a_card_that_holds_is_compiled_once(self, measured, tmp_path):
    noted = tmp_path / "workdir" / "checked.json"
    assert cards.check(STORED[:1], noted) == cards.check(STORED[:1], noted) == []
    assert measured[1] == [STORED[0].name]

  def test_a_card_is_compiled_again_for_other_code(self, measured, tmp_path, monkeypatch):
    cards.check(STORED[:1], tmp_path / "checked.json")
    monkeypatch.setattr(cards, "source_digest", lambda: "other")
    cards.check(STORED[:1], tmp_path / "checked.json")
    assert len(measured[1]) == 2

  def test_another_number_is_named_each_time(self, measured, tmp_path):
    measured[0]["flops"] *= 2
    for _ in range(2):
      [sentence] = cards.check(STORED[:1], tmp_path / "checked.json")
      assert sentence == f"{STORED[0].size}/{STORED[0].name} differs: flops by 50.00%."

  def test_a_card_of_another_compiler_does_not_pass(self, measured, tmp_path, monkeypatch):
    monkeypatch.setattr(cards, "compiler", lambda: "libtpu 9, jax 9")
    [sentence] = cards.check(STORED[:1], tmp_path / "checked.json")
    assert sentence.endswith("and libtpu 9, jax 9 is installed.")
    assert not measured[1]
