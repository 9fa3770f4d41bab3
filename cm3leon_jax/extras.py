"""What to install for a part of the package that needs further packages."""

from importlib import metadata
import re


def install(extra: str) -> str:
  """Returns the command that installs the packages of an extra, for a shell.

  install("serve") = "pip install 'python-multipart>=0.0.20' 'starlette<2,>=1.0' 'uvicorn>=0.40'"

  The package is on no index, so its own name installs nothing. A checkout that is not installed
  has no metadata: there it is `pip install -e '.[serve]'`.
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
