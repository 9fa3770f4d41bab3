"""Runs `cm3leon plan` in a checkout: `python -m launch.plan`."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("plan")
