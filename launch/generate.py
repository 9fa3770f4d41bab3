"""The command `cm3leon_jax.commands.generate`, for those who work in a checkout."""

import runpy

if __name__ == "__main__":
  runpy.run_module("cm3leon_jax.commands.generate", run_name="__main__")
