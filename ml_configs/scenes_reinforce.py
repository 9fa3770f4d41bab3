"""The config `cm3leon_jax/configs/scenes_reinforce.py`, for those who work in a checkout."""

from cm3leon_jax.configs.scenes_reinforce import get_config

__all__ = ["get_config"]
