import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.training.optimizer import OptimizerConfig, create_optimizer, learning_rate_schedule


@pytest.mark.parametrize(("schedule", "middle"), [("cosine", 0.55), ("linear", 0.55)])
def test_schedule_literals(schedule, middle):
  rate = learning_rate_schedule(
    OptimizerConfig(learning_rate=1.0, warmup_steps=10, schedule=schedule), 110
  )
  assert [float(rate(s)) for s in (0, 5, 10)] == pytest.approx([0.0, 0.5, 1.0])
  assert float(rate(60)) == pytest.approx(middle)
  assert float(rate(110)) == pytest.approx(0.1)


def test_warm_up_takes_at_most_half_of_a_short_run():
  rate = learning_rate_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=1_500), 20)
  assert float(rate(10)) == pytest.approx(1.0)


def test_decay_spares_norm_scales_and_clipping_bounds_the_update():
  optimizer = create_optimizer(
    OptimizerConfig(learning_rate=1.0, warmup_steps=0, weight_decay=0.5), 10
  )
  params = {"norm": {"scale": jnp.ones(3)}, "embed": jnp.ones(3)}
  updates, _ = optimizer.update(
    jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
  )
  np.testing.assert_allclose(updates["norm"]["scale"], 0)
  np.testing.assert_allclose(updates["embed"], -0.5)


def test_decay_may_spare_the_tables_of_tokens_and_positions():
  config = OptimizerConfig(
    learning_rate=1.0, warmup_steps=0, weight_decay=0.5, decay_embeddings=False
  )
  optimizer, params = (
    create_optimizer(config, 10),
    {name: jnp.ones(3) for name in ("embed", "positions", "head")},
  )
  updates, _ = optimizer.update(
    jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
  )
  for name, change in (("embed", 0), ("positions", 0), ("head", -0.5)):
    np.testing.assert_allclose(updates[name], change)


def test_the_first_moment_may_be_kept_in_bfloat16():
  params = {"embed": jnp.ones(3)}
  step = {}
  for dtype in ("float32", "bfloat16"):
    optimizer = create_optimizer(
      OptimizerConfig(first_moment_dtype=dtype, warmup_steps=0, clip_norm=1e9), 10
    )
    state = optimizer.init(params)
    assert state[1][0].mu["embed"].dtype == dtype
    assert state[1][0].nu["embed"].dtype == jnp.float32
    for gradient in (0.3, 0.111):
      updates, state = optimizer.update({"embed": jnp.full(3, gradient)}, state, params)
    step[dtype] = np.asarray(updates["embed"])
  np.testing.assert_allclose(step["bfloat16"], step["float32"], rtol=2**-8)
  assert np.any(step["bfloat16"] != step["float32"])
