"""Runs `cm3leon evaluate` in a checkout: `python -m launch.evaluate`."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("evaluate")
