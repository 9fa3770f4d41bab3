from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cm3leon_jax.evaluation import judged


@given(st.lists(st.sampled_from("abc"), max_size=20), st.integers(0, 25), st.integers(0, 2**32 - 1))
def test_a_sheet_is_spread_over_the_tags(tags, count, seed):
  chosen = judged.spread(tags, count, seed)
  assert len(set(chosen)) == len(chosen) == min(count, len(tags))
  assert chosen == judged.spread(tags, count, seed)
  taken, all_of = Counter(tags[i] for i in chosen), Counter(tags)
  most = max(taken.values(), default=0)
  assert all(taken[tag] >= min(all_of[tag], most - 1) for tag in all_of)
