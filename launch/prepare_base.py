"""Runs `cm3leon prepare_base` in a checkout: `python -m launch.prepare_base`."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("prepare_base")
