import subprocess
import sys

from cm3leon_jax.extras import install

SCRIPT = """
import sys
sys.modules["fonticon_mdi7"] = None  # As if it were not installed.
from cm3leon_jax.data.raw import ingest
from cm3leon_jax.scenes.source import ScenesSource
from cm3leon_jax.settings import default_config, settings_from_config
drawn = ScenesSource(settings_from_config(default_config()).scenes)
try:
  ingest.parts_of(ingest.RawConfig(source="scenes", resolution=48), drawn)
except ValueError as error:
  print(error)
"""


def test_without_the_extra_the_drawings_of_scenes_are_missing():
  result = subprocess.run(
    [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
  )
  (line,) = result.stdout.splitlines()
  assert line.startswith("the drawings of 'scenes' are not installed (")
  assert line.endswith(f"): {install('demo')}.")
