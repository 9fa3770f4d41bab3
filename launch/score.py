"""Runs `cm3leon score` in a checkout: `python -m launch.score`."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("score")
