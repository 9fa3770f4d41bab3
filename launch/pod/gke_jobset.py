r"""Prints the JobSet of a run: gke_jobset.yaml with values of the environment and flags of the run.

export NAME=cm3leon-7b IMAGE=us-docker.pkg.dev/my-project/my-repository/cm3leon:tpu
export ACCELERATOR=tpu-v5-lite-podslice TOPOLOGY=16x16
python -m launch.pod.gke_jobset --config=ml_configs/cm3leon_7b.py --workdir=gs://my-bucket/7b \
  --config.mesh.fsdp=16 --config.mesh.fsdp_inner=16 | kubectl apply -f -

Optional: SLICES=1, CHIPS_PER_HOST=4, MAX_RESTARTS=20, GRACE_SECONDS=900. Guide: docs/pods.md.
"""

from collections.abc import Mapping, Sequence
import math
import os
import pathlib
import re
import sys

import yaml

MANIFEST = pathlib.Path(__file__).with_suffix(".yaml")
EXAMPLES = {
  "NAME": "cm3leon-7b",
  "IMAGE": "us-docker.pkg.dev/my-project/my-repository/cm3leon:tpu",
  "ACCELERATOR": "tpu-v5-lite-podslice",
  "TOPOLOGY": "16x16",
}
DEFAULTS = {"SLICES": 1, "CHIPS_PER_HOST": 4, "MAX_RESTARTS": 20, "GRACE_SECONDS": 900}


def _number(environment: Mapping[str, str], name: str) -> int:
  text = environment.get(name) or str(DEFAULTS[name])
  if not re.fullmatch(r"[1-9]\d*", text):
    raise ValueError(f"{name} is '{text}'; it must be a positive whole number.")
  return int(text)


def jobset(environment: Mapping[str, str], flags: Sequence[str]) -> dict:
  """Returns the manifest as a dict.

  Args:
    environment: the variables of EXAMPLES, and those of DEFAULTS that differ.
    flags: of launch.train; --config and a --workdir in a bucket among them.

  Raises:
    ValueError: a variable or a flag is missing or wrong.
  """
  for name, example in EXAMPLES.items():
    if not environment.get(name):
      raise ValueError(f"{name} is not set: export it, as in {name}={example}.")
  if not any(re.match("--config=.", flag) for flag in flags):
    raise ValueError("the flag --config=FILE is missing, as in --config=ml_configs/cm3leon_7b.py.")
  if not any(re.match("--workdir=gs://.", flag) for flag in flags):
    raise ValueError(
      "the flag --workdir=gs://BUCKET/FOLDER is missing: all hosts read and write one workdir."
    )
  topology = environment["TOPOLOGY"]
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", topology):
    raise ValueError(
      f"TOPOLOGY is '{topology}'; it must be the chips along each axis, as in 16x16 or 4x4x8."
    )
  chips, per_host = math.prod(map(int, topology.split("x"))), _number(environment, "CHIPS_PER_HOST")
  if chips % per_host:
    raise ValueError(
      f"CHIPS_PER_HOST is {per_host}; it does not divide the {chips} chips of TOPOLOGY={topology}."
    )

  manifest = yaml.safe_load(MANIFEST.read_text())
  manifest["metadata"]["name"] = environment["NAME"]
  spec = manifest["spec"]
  spec["failurePolicy"]["maxRestarts"] = _number(environment, "MAX_RESTARTS")
  spec["replicatedJobs"][0]["replicas"] = _number(environment, "SLICES")
  job = spec["replicatedJobs"][0]["template"]["spec"]
  job["parallelism"] = job["completions"] = chips // per_host
  pod = job["template"]["spec"]
  pod["terminationGracePeriodSeconds"] = _number(environment, "GRACE_SECONDS")
  pod["nodeSelector"] = {
    "cloud.google.com/gke-tpu-accelerator": environment["ACCELERATOR"],
    "cloud.google.com/gke-tpu-topology": topology,
  }
  container = pod["containers"][0]
  container["image"] = environment["IMAGE"]
  # Kubernetes replaces $(NAME) by a variable; $$( stands for a literal $(.
  container["args"] = ["--distributed", *(flag.replace("$(", "$$(") for flag in flags)]
  container["resources"]["limits"]["google.com/tpu"] = str(per_host)
  return manifest


def main() -> None:
  try:
    print(yaml.safe_dump(jobset(os.environ, sys.argv[1:]), sort_keys=False), end="")
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  main()
