"""Runs `cm3leon generate` in a checkout: `python -m launch.generate`."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("generate")
