"""The config `cm3leon_jax/configs/scenes_instruct.py`, for those who work in a checkout."""

from cm3leon_jax.configs.scenes_instruct import get_config

__all__ = ["get_config"]
