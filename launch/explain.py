"""Runs `cm3leon explain` in a checkout: `python -m launch.explain`."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("explain")
