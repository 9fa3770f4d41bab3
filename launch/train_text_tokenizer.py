"""The command `cm3leon_jax.commands.train_text_tokenizer`, for those who work in a checkout."""

import runpy

if __name__ == "__main__":
  runpy.run_module("cm3leon_jax.commands.train_text_tokenizer", run_name="__main__")
