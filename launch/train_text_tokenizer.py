"""Runs `cm3leon train_text_tokenizer` in a checkout: `python -m launch.train_text_tokenizer`."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("train_text_tokenizer")
