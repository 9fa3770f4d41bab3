"""Runs `cm3leon import_weights` in a checkout: `python -m launch.import_weights`."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("import_weights")
