"""`python -m launch.export`: `cm3leon export` in a checkout."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("export")
