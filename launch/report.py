"""`python -m launch.report`: `cm3leon report` in a checkout."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("report")
