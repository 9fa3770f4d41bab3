import pytest

from cm3leon_jax.config import TryAgain
from cm3leon_jax.training.saves.failed_saves import FailedSaves
from tests.training.fakes import FakeCheckpoints


def test_a_save_that_has_failed_ends_the_training():
  FailedSaves(FakeCheckpoints()).after(1, None, {})
  with pytest.raises(TryAgain, match="disk full"):
    FailedSaves(FakeCheckpoints(TryAgain("disk full"))).after(1, None, {})
