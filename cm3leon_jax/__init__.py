"""CM3Leon in JAX: pretraining, generation, evaluation and export of retrieval-augmented text and image models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from cm3leon_jax.api import CM3Leon
  from cm3leon_jax.config import UserError

__version__ = "0.1.0"
__all__ = ["CM3Leon", "UserError", "__version__"]


def __getattr__(name: str) -> Any:
  """Imports the public names when they are first used: `import cm3leon_jax` alone imports nothing."""
  if name == "CM3Leon":
    from cm3leon_jax.api import CM3Leon

    return CM3Leon
  if name == "UserError":
    from cm3leon_jax.config import UserError

    return UserError
  raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
