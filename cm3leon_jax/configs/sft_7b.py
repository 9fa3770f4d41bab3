"""Tunes CM3Leon-7B on instructions (paper: section 4, appendix E): 30B tokens, 2M per step.

cm3leon train --config=sft_7b --workdir=runs/sft_7b \\
  --config.instructions.root=DATA --init_from=runs/cm3leon_7b
cm3leon train --config=sft_7b:paper --workdir=runs/sft_7b_paper \\
  --config.instructions.root=DATA --init_from=runs/cm3leon_7b_paper

--init_from takes a workdir or an exported model of the same variant. docs/tuning.md describes
the stages that must run before.
"""

import ml_collections

from cm3leon_jax.configs import cm3leon_7b, defaults


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  return defaults.instruction_tuning(cm3leon_7b.get_config(variant))
