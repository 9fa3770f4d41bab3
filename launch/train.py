"""Runs `cm3leon train` in a checkout: `python -m launch.train`."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("train")
