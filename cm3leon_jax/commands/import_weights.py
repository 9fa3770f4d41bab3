"""Imports trained weights from a local folder, so that a run starts from them.

  cm3leon import_weights --config=cm3leon_350m --workdir=runs/from_text \\
    --source=DIR

DIR contains safetensors files, config.json and tokenizer.json. It is an export of this project or a
text model of the class Qwen3ForCausalLM or OPTForCausalLM without biases. The command refuses a
model that it cannot import exactly, and prints the reason. It downloads nothing. It writes
text_tokenizer/ and init/ in the workdir, from which the later stages and cm3leon train start, on
any mesh. It prints the flags that set config fields to the values that the model needs.
"""

from __future__ import annotations

from collections.abc import Collection

from absl import flags
from etils import epath, epy
from ml_collections import config_flags

from cm3leon_jax.commands import common
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.errors import UserError

with epy.lazy_imports():
  from cm3leon_jax.importing import importer

_SOURCE = flags.DEFINE_string(
  "source",
  "",
  "Folder of the checkpoint.",
  allow_override=True,  # import_vqgan also defines this flag, and tests import both modules.
)


def main(settings: Settings, workdir: epath.Path, source: str, given: Collection[str] = ()) -> None:
  """Imports the weights and prints a summary.

  `given` has the names of the config fields that were set by flags, e.g. "model.width". The next
  commands need the same flags.
  """
  if not source:
    raise UserError("name the folder of the checkpoint: --source=DIR.")
  found = importer.plan(settings, source)
  for line in importer.write(settings, workdir, found):
    print(f"import_weights: {line}", flush=True)
  needed = importer.flags(found.fields, given)
  print(
    "import_weights: the next stages, and `cm3leon train` with this --workdir, start from it"
    + (f" and need {needed}" if needed else "."),
    flush=True,
  )


if __name__ == "__main__":
  common.run(
    lambda settings, workdir: main(
      settings, workdir, _SOURCE.value, config_flags.get_override_values(flags.FLAGS["config"])
    )
  )
