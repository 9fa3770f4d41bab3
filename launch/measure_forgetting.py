"""Runs `cm3leon measure_forgetting` in a checkout: `python -m launch.measure_forgetting`."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("measure_forgetting")
