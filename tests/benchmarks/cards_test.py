"""Tests that the numbers on the pages of the config cards are the stored numbers.

`python -m benchmarks.speed.cards --check` compiles the configs again and compares the results.
"""

import pytest

from benchmarks.speed import cards

STORED = [card for card in cards.CARDS if card.name in cards.stored(card.size)]


@pytest.mark.parametrize("size", cards.SIZES)
def test_the_page_shows_every_card_that_is_stored(size):
  stored = cards.stored(size)
  page = (cards.FOLDER / f"{cards.config_of(size)}.md").read_text()
  assert page == cards.page(size, stored), "run python -m benchmarks.speed.cards"
  for card in cards.CARDS:
    if card.size == size and card.name in stored:
      assert stored[card.name]["command"] == " ".join(card.command), card.name
      assert stored[card.name]["sum_gib"] < stored[card.name]["hbm_gib"], card.name


def test_there_is_a_card_of_each_size_slice_and_program():
  number = len(cards.PRETRAINED) * len(cards.SLICES) * len(cards.PROGRAMS) - len(cards.NOT_PRINTED)
  number += len(cards.ADAPTED) + len(cards.GROUPED)
  number += (len(cards.GPUS) * len(cards.PRETRAINED) + len(cards.GPUS_7B)) * len(cards.PROGRAMS)
  number += len(cards.PLAIN) + 1 + 2 + len(cards.SMALL) + 2 * len([*cards.SMALL, "h100-8"])
  assert len(cards.CARDS) == len({(c.size, c.name) for c in cards.CARDS}) == number == 83
  assert [card for card in cards.CARDS if not card.gpu or card in STORED] == STORED


def test_drift_is_the_relative_change_of_each_number():
  old = {"arguments_gib": 2.0, "temporaries_gib": 4.0, "flops": 8.0}
  old["collectives"] = {"all-gather": {"count": 1, "bytes": 100}}
  new = {**old, "flops": 10.0, "collectives": {"all-reduce": {"count": 1, "bytes": 5}}}
  assert cards.drift(old, old) == {}
  changed = [f"{name}, {x}" for name in ("all-gather", "all-reduce") for x in ("count", "bytes")]
  assert cards.drift(old, new) == {"flops": 0.2, **dict.fromkeys(changed, 1.0)}


def test_a_card_is_compiled_once_until_a_number_differs(tmp_path, monkeypatch):
  card = STORED[0]
  old, names = cards.stored(card.size)[card.name], []
  new = {**old}
  monkeypatch.setattr(cards.Card, "compiler", old["compiler"])
  monkeypatch.setattr(cards, "measure", lambda card: names.append(card.name) or new)
  noted = tmp_path / "workdir" / "checked.json"
  assert cards.check([card], noted) == cards.check([card], noted) == []
  assert names == [card.name]
  monkeypatch.setattr(cards, "source_digest", lambda: "other")
  new["flops"] *= 2
  [sentence] = cards.check([card], noted)
  assert sentence == f"{card.size}/{card.name} differs: flops by 50.00%."
  monkeypatch.setattr(cards.Card, "compiler", "libtpu 9, jax 9")
  [sentence] = cards.check([card], noted)
  assert sentence.endswith("and libtpu 9, jax 9 is installed.")
