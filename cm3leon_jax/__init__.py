"""CM3Leon in JAX: pretraining, generation, evaluation and export of retrieval-augmented text and image models."""

__version__ = "0.1.0"
