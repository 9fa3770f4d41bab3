"""Defines CM3Leon-760M (Table 3 of the paper; number of heads and feed-forward width from OPT).

cm3leon train --config=cm3leon_760m --workdir=runs/cm3leon_760m
cm3leon train --config=cm3leon_760m:paper --workdir=runs/cm3leon_760m_paper
"""

import ml_collections

from cm3leon_jax.configs import defaults


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  config = defaults.get_config(variant, learning_rate=5e-4, tokens=1.9e12)
  config.model.update(num_layers=24, width=1_536, num_heads=16, mlp_width=6_144)
  config.train.update(rows_per_device=4)
  return config
