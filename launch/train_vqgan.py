"""Runs `cm3leon train_vqgan` in a checkout: `python -m launch.train_vqgan`."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("train_vqgan")
