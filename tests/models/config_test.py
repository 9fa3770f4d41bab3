import pytest

from cm3leon_jax.config import UserError, build
from cm3leon_jax.models.config import ModelConfig


def test_defaults_are_seven_billion():
  c = ModelConfig()
  blocks = c.num_layers * (4 * c.width**2 + 2 * c.width * c.mlp_width)
  assert 6.6e9 < blocks + c.width * (c.vocab_size + c.max_positions) < 6.8e9


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"num_heads": 7}, "config.model: num_heads = 7 does not divide width = 4096"),
    ({"family": "gpt"}, "config.model: family is 'gpt'; it must be one of opt, modern"),
    ({"num_layer": 2}, "config.model has no field 'num_layer': did you mean 'num_layers'"),
    ({"width": "wide"}, "config.model.width is 'wide'; it must be int"),
    ({"embed_std": 0.0}, "config.model: embed_std is 0.0; it must be positive"),
    ({"num_layers": 0}, "config.model: num_layers is 0; it must be positive"),
    (
      {"family": "modern", "width": 6, "num_heads": 2},
      "config.model: width / num_heads = 3 is odd",
    ),
  ],
)
def test_errors_name_the_field(fields, message):
  with pytest.raises(UserError, match=message):
    build(ModelConfig, fields, "model")
