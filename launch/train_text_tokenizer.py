"""`python -m launch.train_text_tokenizer`: `cm3leon train_text_tokenizer` in a checkout."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("train_text_tokenizer")
