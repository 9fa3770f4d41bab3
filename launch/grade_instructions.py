"""Runs `cm3leon grade_instructions` in a checkout: `python -m launch.grade_instructions`."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("grade_instructions")
