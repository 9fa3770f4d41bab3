"""Finds the command that installs the packages of an optional extra."""

from importlib import metadata
import re


def install(extra: str) -> str:
  """Returns the shell command that installs the packages of an extra.

  install("serve") = "pip install 'python-multipart>=0.0.20' 'starlette<2,>=1.0' 'uvicorn>=0.40'"

  The command lists the packages, because cm3leon_jax itself is not on PyPI. A checkout that is not
  installed has no metadata, so its command is `pip install -e '.[serve]'`.
  """
  try:
    requirements = metadata.requires("cm3leon_jax") or []
  except metadata.PackageNotFoundError:
    requirements = []
  packages = []
  for requirement in requirements:
    package, _, marker = requirement.partition(";")
    if re.search(rf"extra == ['\"]{re.escape(extra)}['\"]", marker):
      packages.append(f"'{package.strip()}'" if re.search(r"[<>=!~\[]", package) else package)
  return f"pip install {' '.join(packages)}" if packages else f"pip install -e '.[{extra}]'"
