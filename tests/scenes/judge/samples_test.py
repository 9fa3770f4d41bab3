from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
import pytest

from cm3leon_jax.scenes.judge import samples


@given(st.lists(st.sampled_from("abc"), max_size=20), st.integers(0, 25), st.integers(0, 2**32 - 1))
def test_a_sheet_is_spread_over_the_categories(tags, count, seed):
  chosen = samples.spread(tags, count, seed)
  assert len(set(chosen)) == len(chosen) == min(count, len(tags))
  assert chosen == samples.spread(tags, count, seed)
  taken, all_of = Counter(tags[i] for i in chosen), Counter(tags)
  most = max(taken.values(), default=0)
  assert all(taken[tag] >= min(all_of[tag], most - 1) for tag in all_of)


def table(correct):
  row = {"images": 4, "correct": {"share": correct}, "place": {"share": 0.5, "low": 0.4}}
  new = {**row, "lookup": {"share": 0.25}}
  kinds = {"tag": {"single_object": row}, "heldout": {"pair": row}}
  return {"all": row, **kinds, "parts": {"scene, new claims": new}, "geneval": correct}


@pytest.mark.parametrize(("shares", "best"), [((0.1, 0.3, 0.2), 2), ((0.3, 0.3, 0.0), 1)])
def test_an_overview_names_the_best_guidance_weight(shares, best):
  weights = {f"guidance {i}": table(share) for i, share in enumerate(shares, 1)}
  tables = {"real images": table(1.0), "reconstructions": table(0.9), **weights}
  judge = {"real": 1.0, "changed_right": 0.0, "images": 4}
  found = samples.overview({"judge": judge, "tables": tables})
  assert found["reconstructions"] == {"correct": 0.9, "place": 0.5, "geneval": 0.9}
  assert found["best"] == {
    "title": f"guidance {best}",
    "correct": {"share": max(shares)},
    "place": {"share": 0.5, "low": 0.4},
    "new_claims": {"share": max(shares)},
    "single_object": {"share": max(shares)},
    "lookup": {"new_claims": 0.25},
  }
  assert "gain" not in found
