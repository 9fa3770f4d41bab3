"""Tunes CM3Leon-350M on instructions (paper: section 4, appendix E): 30B tokens, 2M per step.

cm3leon train --config=sft_350m --workdir=runs/sft_350m \\
  --config.instructions.root=DATA --init_from=runs/cm3leon_350m
cm3leon train --config=sft_350m:paper --workdir=runs/sft_350m_paper \\
  --config.instructions.root=DATA --init_from=runs/cm3leon_350m_paper

--init_from takes a workdir or an exported model of the same variant. docs/tuning.md describes
the stages before the training.
"""

import ml_collections

from cm3leon_jax.configs import cm3leon_350m, defaults


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  return defaults.instruction_tuning(cm3leon_350m.get_config(variant))
