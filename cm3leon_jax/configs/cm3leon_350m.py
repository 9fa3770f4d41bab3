"""Defines CM3Leon-350M (Table 3 of the paper; number of heads and feed-forward width from OPT).

cm3leon train --config=cm3leon_350m --workdir=runs/cm3leon_350m
cm3leon train --config=cm3leon_350m:paper --workdir=runs/cm3leon_350m_paper
"""

import ml_collections

from cm3leon_jax.configs import defaults


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  config = defaults.get_config(variant, learning_rate=6e-4, tokens=1.4e12)
  config.model.update(num_layers=24, width=1_024, num_heads=16, mlp_width=4_096)
  config.train.update(rows_per_device=4)
  return config
