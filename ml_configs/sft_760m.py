"""The config `cm3leon_jax/configs/sft_760m.py`, for those who work in a checkout."""

from cm3leon_jax.configs.sft_760m import get_config

__all__ = ["get_config"]
