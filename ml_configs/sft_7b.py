"""The config `cm3leon_jax/configs/sft_7b.py`, for those who work in a checkout."""

from cm3leon_jax.configs.sft_7b import get_config

__all__ = ["get_config"]
