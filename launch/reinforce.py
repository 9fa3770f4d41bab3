"""Runs `cm3leon reinforce` in a checkout: `python -m launch.reinforce`."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("reinforce")
