import pytest

from cm3leon_jax import worlds


@pytest.mark.parametrize(
  ("name", "expected"),
  [("scenes/count", "scenes"), ("jsonl", ""), ("scenes", ""), ("other/count", "")],
)
def test_a_format_names_a_world_before_its_task(name, expected):
  assert worlds.world_of_format(name) == expected
