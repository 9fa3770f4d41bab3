"""Tunes CM3Leon-760M on instructions (paper: section 4, appendix E): 30B tokens, 2M per step.

cm3leon train --config=sft_760m --workdir=runs/sft_760m \\
  --config.instructions.root=DATA --init_from=runs/cm3leon_760m
cm3leon train --config=sft_760m:paper --workdir=runs/sft_760m_paper \\
  --config.instructions.root=DATA --init_from=runs/cm3leon_760m_paper

--init_from takes a workdir or an exported model of the same variant. docs/tuning.md describes
the stages before the training.
"""

import ml_collections

from cm3leon_jax.configs import cm3leon_760m, defaults


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  return defaults.instruction_tuning(cm3leon_760m.get_config(variant))
