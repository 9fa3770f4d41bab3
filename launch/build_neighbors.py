"""Runs `cm3leon build_neighbors` in a checkout: `python -m launch.build_neighbors`."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("build_neighbors")
