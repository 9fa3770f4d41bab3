"""Prints digests of training rows as JSON: python golden_rows.py WORKDIR COUNT.

`benchmarks.golden` runs this script with the package of one of its two versions.
"""

import hashlib
import json
import sys

from etils import epath

try:
  from cm3leon_jax.run.folders import settings_of_run
  from cm3leon_jax.run.rows import open_rows
except ModuleNotFoundError:  # An earlier commit.
  from cm3leon_jax.settings import settings_of_run  # type: ignore[no-redef]
  from cm3leon_jax.trained.rows import open_rows  # type: ignore[no-redef]


def main(workdir: str, count: str) -> None:
  folder = epath.Path(workdir)
  loader = open_rows(settings_of_run(folder), folder, "train")
  digests = {}
  for number in range(int(count)):
    digest = hashlib.sha256()
    for name, array in sorted(loader[number].items()):
      digest.update(f"{name} {array.dtype} {array.shape}".encode())
      digest.update(array.tobytes())
    digests[number] = digest.hexdigest()
  json.dump(digests, sys.stdout)


if __name__ == "__main__":
  main(*sys.argv[1:])
