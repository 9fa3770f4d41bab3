"""Runs `cm3leon checkpoints` in a checkout: `python -m launch.checkpoints`."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("checkpoints")
