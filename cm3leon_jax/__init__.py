"""Implements CM3Leon in JAX: retrieval-augmented models of text and images, from data to export."""

from typing import TYPE_CHECKING, Any

from cm3leon_jax.errors import UserError
from cm3leon_jax.version import VERSION

if TYPE_CHECKING:
  from cm3leon_jax.api import CM3Leon
  from cm3leon_jax.generation.sample import grid

__version__ = VERSION
__all__ = ["CM3Leon", "UserError", "__version__", "grid"]


def __getattr__(name: str) -> Any:
  """Imports a name when it is first used, so that `import cm3leon_jax` is fast."""
  if name == "CM3Leon":
    from cm3leon_jax.api import CM3Leon

    return CM3Leon
  if name == "grid":
    from cm3leon_jax.generation.sample import grid

    return grid
  raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
