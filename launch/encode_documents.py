"""Runs `cm3leon encode_documents` in a checkout: `python -m launch.encode_documents`."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("encode_documents")
