"""The config `cm3leon_jax/configs/openmoji.py`, for those who work in a checkout."""

from cm3leon_jax.configs.openmoji import get_config

__all__ = ["get_config"]
