"""The command `cm3leon_jax.commands.encode_documents`, for those who work in a checkout."""

import runpy

if __name__ == "__main__":
  runpy.run_module("cm3leon_jax.commands.encode_documents", run_name="__main__")
