"""The config `cm3leon_jax/configs/scenes.py`, for those who work in a checkout."""

from cm3leon_jax.configs.scenes import get_config

__all__ = ["get_config"]
