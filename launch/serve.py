"""`python -m launch.serve`: `cm3leon serve` in a checkout."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("serve")
