"""Runs `cm3leon export` in a checkout: `python -m launch.export`."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("export")
