"""Detects accelerators without importing JAX."""

import glob
import importlib.util
import os
import sys

from cm3leon_jax import extras
from cm3leon_jax.config import UserError

# Device files of TPUs (accel, vfio), NVIDIA GPUs, AMD GPUs (kfd) and GPUs under WSL (dxg).
DEVICE_FILES = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")
# (modules, extras): JAX needs one of these modules, and these extras of this package install them.
GPU = (("jax_cuda12_plugin", "jax_cuda13_plugin"), ("cuda12", "cuda13"))
PLUGINS = {  # The keys are values of JAX_PLATFORMS.
  "gpu": GPU,
  "cuda": GPU,
  "tpu": (("libtpu",), ("tpu",)),
}


def use_cpu_if_alone() -> None:
  """Sets JAX_PLATFORMS=cpu on a Linux machine without accelerators.

  Call this function before JAX is imported. Otherwise JAX loads every installed plugin, and libtpu
  and CUDA warn about missing devices. If JAX_PLATFORMS is already set, it is not changed.
  """
  if sys.platform == "linux" and not any(map(glob.glob, DEVICE_FILES)):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def check_platforms() -> None:
  """Raises UserError if JAX_PLATFORMS names a platform whose plugin is not installed."""
  value = os.environ.get("JAX_PLATFORMS", "")
  for platform in value.split(","):
    modules, names = PLUGINS.get(platform.strip(), ((), ()))
    if modules and not any(map(importlib.util.find_spec, modules)):
      raise UserError(
        f"JAX_PLATFORMS is {value}, but JAX's plugin for {platform.strip()} is not installed: "
        f"{' or '.join(map(extras.install, names))}, or unset JAX_PLATFORMS."
      )
