"""Runs `cm3leon prepare_data` in a checkout: `python -m launch.prepare_data`."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("prepare_data")
