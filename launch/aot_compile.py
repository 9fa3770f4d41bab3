"""`python -m launch.aot_compile`: `cm3leon aot_compile` in a checkout."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("aot_compile")
