"""Implements CM3Leon in JAX: retrieval-augmented models of text and images, from data to export."""

from typing import TYPE_CHECKING, Any

from cm3leon_jax.config import UserError

if TYPE_CHECKING:
  from cm3leon_jax.api import CM3Leon

__version__ = "0.3.0"
__all__ = ["CM3Leon", "UserError", "__version__"]


def __getattr__(name: str) -> Any:
  """Imports `CM3Leon` when it is first used, so that `import cm3leon_jax` is fast."""
  if name == "CM3Leon":
    from cm3leon_jax.api import CM3Leon

    return CM3Leon
  raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
