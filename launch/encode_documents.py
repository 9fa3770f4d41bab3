"""`python -m launch.encode_documents`: `cm3leon encode_documents` in a checkout."""

from cm3leon_jax.__main__ import start

if __name__ == "__main__":
  start("encode_documents")
