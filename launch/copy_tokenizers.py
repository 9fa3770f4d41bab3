"""Runs `cm3leon copy_tokenizers` in a checkout: `python -m launch.copy_tokenizers`."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("copy_tokenizers")
