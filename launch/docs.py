"""Runs `cm3leon docs` in a checkout: `python -m launch.docs`."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("docs")
