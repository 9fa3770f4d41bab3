"""Names the optional extra that has a missing package."""


def install(extra: str) -> str:
  """Returns what to do if a package of an extra is missing."""
  return f"install cm3leon_jax with its extra [{extra}]"
