"""Runs `cm3leon aot_compile` in a checkout: `python -m launch.aot_compile`."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("aot_compile")
