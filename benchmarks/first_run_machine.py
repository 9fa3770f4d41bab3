"""Prints the devices and versions of this machine as one line of JSON, for `first_run`."""

import datetime
from importlib import metadata
import json
import os
import pathlib
import platform
import subprocess

import jax

from cm3leon_jax.training.watch.flops import device_peak

PACKAGES = (
  "jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "orbax-checkpoint",
)  # fmt: skip


def output_of(*command: str) -> str:
  """Returns the output of a command, or "" if it does not exist or fails."""
  try:
    result = subprocess.run(command, capture_output=True, text=True, check=True)
  except (OSError, subprocess.CalledProcessError):
    return ""
  return result.stdout.strip()


def version(package: str) -> str:
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return ""


def processor() -> str:
  lines = output_of("lscpu").splitlines()
  names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("Model name")]
  return f"{os.cpu_count()} x {names[0] if names else platform.machine()}"


def describe() -> dict:
  """Returns devices, memory and versions. Values that are not known are left out."""
  device = jax.devices()[0]
  stats = (device.memory_stats() or {}) if device.platform != "cpu" else {}
  limit, peak = stats.get("bytes_limit"), device_peak(device.device_kind)
  values = {
    "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    "platform": device.platform,
    "devices": f"{jax.device_count()} x {device.device_kind}",
    "memory": f"{limit / 2**30:.2f} GiB per device" if limit else "",
    "peak": f"{peak / 1e12:,.0f} TFLOP/s in bfloat16, published" if peak else "",
    "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    "processor": processor(),
    "system": platform.platform(),
    "python": platform.python_version(),
    "commit": output_of("git", "-C", str(pathlib.Path(__file__).parent), "rev-parse", "HEAD"),
    **{package: version(package) for package in PACKAGES},
  }
  return {name: value for name, value in values.items() if value}


if __name__ == "__main__":
  print(json.dumps(describe()))
