"""Runs `cm3leon encode_instructions` in a checkout: `python -m launch.encode_instructions`."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("encode_instructions")
