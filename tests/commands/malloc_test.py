import subprocess
import sys

import pytest

MEASURE = """
import resource
import numpy as np
from cm3leon_jax.commands import malloc

def resident():  # MB
  with open("/proc/self/statm") as file:
    return int(file.read().split()[1]) * resource.getpagesize() >> 20

{before}
first = resident()
array = np.ones(25_000_000)  # 200 MB
del array
print(resident() - first)
"""


def kept(before):
  """Returns how many MB a process keeps of an array that it has freed."""
  command = [sys.executable, "-c", MEASURE.format(before=before)]
  return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_freed_arrays_stay_in_the_process():
  assert kept("malloc.keep_freed()") > 150
  assert kept("") < 50
