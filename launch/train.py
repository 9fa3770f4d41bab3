"""`python -m launch.train`: `cm3leon train` in a checkout."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("train")
