"""The config `cm3leon_jax/configs/cm3leon_350m.py`, for those who work in a checkout."""

from cm3leon_jax.configs.cm3leon_350m import get_config

__all__ = ["get_config"]
