import dataclasses

from absl import flags
from absl.testing import flagsaver

from cm3leon_jax.commands import sampling_flags
from tests.generation.run import SETTINGS


def test_flags_set_every_field_but_guidance():
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  given = {"method": "mixture", "temperature": 0.5, "top_k": 3, "text_top_p": 0.25}
  with flagsaver.flagsaver(**given):
    found = sampling_flags.applied(SETTINGS)
  changed = dataclasses.replace(SETTINGS.sampling, **given)
  assert found == dataclasses.replace(SETTINGS, sampling=changed)
  fields = {field.name for field in dataclasses.fields(changed)}
  assert fields - set(flags.FLAGS) <= {"guidance"}
