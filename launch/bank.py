"""Runs `cm3leon bank` in a checkout: `python -m launch.bank`."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("bank")
