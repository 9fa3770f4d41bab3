"""Runs `cm3leon inspect_data` in a checkout: `python -m launch.inspect_data`."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("inspect_data")
