"""`python -m launch.plan`: `cm3leon plan` in a checkout."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("plan")
