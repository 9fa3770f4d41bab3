"""Runs `cm3leon import_vqgan` in a checkout: `python -m launch.import_vqgan`."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("import_vqgan")
