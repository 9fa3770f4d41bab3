"""The config `cm3leon_jax/configs/base.py`, for those who work in a checkout."""

from cm3leon_jax.configs.base import get_config

__all__ = ["get_config"]
