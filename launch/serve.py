"""Runs `cm3leon serve` in a checkout: `python -m launch.serve`."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("serve")
