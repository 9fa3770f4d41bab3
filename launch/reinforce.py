"""`python -m launch.reinforce`: `cm3leon reinforce` in a checkout."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("reinforce")
