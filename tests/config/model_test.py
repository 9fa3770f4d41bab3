from cm3leon_jax.config.model import ModelConfig


def test_defaults_are_seven_billion():
  c = ModelConfig()
  blocks = c.num_layers * (4 * c.width**2 + 2 * c.width * c.mlp_width)
  assert 6.6e9 < blocks + c.width * (c.vocab_size + c.max_positions) < 6.8e9
