"""Defines CM3Leon-7B (Table 3 of the paper; number of heads and feed-forward width from OPT).

cm3leon train --config=cm3leon_7b --workdir=runs/cm3leon_7b
cm3leon train --config=cm3leon_7b:paper --workdir=runs/cm3leon_7b_paper
cm3leon train --config=cm3leon_7b:gqa --workdir=runs/cm3leon_7b_gqa

`:gqa` has layers with the sizes of Qwen3-8B, which has 8 key heads for 32 heads, so the cache of
generation takes a quarter of the memory. The number of parameters is nearly that of CM3Leon-7B.
The image tokenizer and CLIP train on one host, unless the run uses published ones; see defaults.py.
"""

import ml_collections

from cm3leon_jax.configs import defaults


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  grouped = variant == "gqa"
  config = defaults.get_config("" if grouped else variant, learning_rate=1.2e-4, tokens=2.4e12)
  config.model.update(num_layers=32, width=4_096, num_heads=32, mlp_width=16_384)
  if grouped:
    config.model.update(family="modern", num_kv_heads=8, mlp_width=12_288)
  config.train.update(rows_per_device=4)
  return config
