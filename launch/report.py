"""Runs `cm3leon report` in a checkout: `python -m launch.report`."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("report")
