"""Detects accelerators without importing JAX."""

import glob
import os
import sys

# Device files of TPUs (accel, vfio), NVIDIA GPUs, AMD GPUs (kfd) and GPUs under WSL (dxg).
DEVICE_FILES = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")


def use_cpu_if_alone() -> None:
  """Sets JAX_PLATFORMS=cpu on a Linux machine without accelerators.

  Call this function before JAX is imported. Otherwise JAX loads every installed plugin, and libtpu
  and CUDA warn about missing devices. If JAX_PLATFORMS is already set, it is not changed.
  """
  if sys.platform == "linux" and not any(map(glob.glob, DEVICE_FILES)):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
