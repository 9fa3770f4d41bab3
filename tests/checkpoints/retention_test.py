import pytest

from cm3leon_jax.checkpoints import retention

NAN = float("nan")


@pytest.mark.parametrize(
  ("losses", "last", "every", "best", "expected"),
  [
    ({}, 2, 0, 0, {5, 6}),
    ({}, 1, 3, 0, {3, 6}),
    ({1: 0.5, 2: 0.3, 3: 0.4, 4: 0.6}, 1, 0, 1, {2, 6}),
    ({1: 0.5, 2: 0.3, 3: 0.4, 4: 0.6}, 1, 5, 2, {2, 3, 5, 6}),
    ({1: NAN, 2: 0.9}, 1, 0, 1, {2, 6}),
    ({1: 0.5}, 1, 0, 2, {1, 6}),  # Checkpoints without a loss are never the best.
  ],
)
def test_a_checkpoint_is_kept_for_any_of_three_reasons(losses, last, every, best, expected):
  assert retention.kept([6, 5, 4, 3, 2, 1], losses, last, every, best) == expected
