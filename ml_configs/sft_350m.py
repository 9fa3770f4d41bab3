"""The config `cm3leon_jax/configs/sft_350m.py`, for those who work in a checkout."""

from cm3leon_jax.configs.sft_350m import get_config

__all__ = ["get_config"]
