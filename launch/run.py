"""`python -m launch.run`: `cm3leon run` in a checkout."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("run")
