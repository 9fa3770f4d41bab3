"""`python -m launch.train_clip`: `cm3leon train_clip` in a checkout."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("train_clip")
