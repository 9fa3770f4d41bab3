"""Runs `cm3leon train_clip` in a checkout: `python -m launch.train_clip`."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("train_clip")
