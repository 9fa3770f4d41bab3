"""Tests that every test checks the shapes and dtypes in signatures, see `conftest.py`."""

import jax
import jax.numpy as jnp
from jaxtyping import TypeCheckError
import pytest

from cm3leon_jax.decoding.sampling.guidance import combine_streams
from cm3leon_jax.models.transformer import rotate
from cm3leon_jax.training.step.loss import modality_sums

ONES = jnp.ones((2, 3))
IDS = jnp.ones((2, 3), jnp.int32)


@pytest.mark.parametrize(
  ("function", "right", "wrong"),
  [
    (rotate, (jnp.ones((2, 3, 1, 4)), IDS), (jnp.ones((2, 3, 1, 4)), IDS[:, :2])),
    (rotate, (jnp.ones((2, 3, 1, 4)), IDS), (jnp.ones((2, 3, 1, 4)), ONES)),
    (modality_sums, (ONES, IDS, ONES, 2), (ONES, IDS, ONES[:1], 2)),
    (combine_streams, (ONES[None], ONES[0, :1]), (ONES, ONES[0, :1])),
  ],
)
def test_a_wrong_shape_or_dtype_is_refused(function, right, wrong):
  jax.eval_shape(lambda: function(*right))
  with pytest.raises(TypeCheckError, match=function.__name__):
    jax.eval_shape(lambda: function(*wrong))
