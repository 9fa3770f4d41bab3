"""`python -m launch.grade_instructions`: `cm3leon grade_instructions` in a checkout."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("grade_instructions")
