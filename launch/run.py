"""Runs `cm3leon run` in a checkout: `python -m launch.run`."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("run")
