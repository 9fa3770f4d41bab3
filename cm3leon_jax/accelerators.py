"""Detection of accelerators without JAX."""

import glob
import os
import sys

# TPU chips; GPUs of NVIDIA, of AMD, and under WSL.
DEVICE_FILES = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")


def use_cpu_if_alone() -> None:
  """Sets JAX_PLATFORMS=cpu on a Linux machine without accelerators; call it before JAX is imported.

  Otherwise JAX loads every installed plugin, and libtpu and CUDA warn about missing devices. A
  JAX_PLATFORMS that is set stays.
  """
  if sys.platform == "linux" and not any(map(glob.glob, DEVICE_FILES)):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
