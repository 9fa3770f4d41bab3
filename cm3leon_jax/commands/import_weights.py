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

import dataclasses

from etils import epath, epy

from cm3leon_jax.commands import common, flag
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.errors import UserError

with epy.lazy_imports():
  from cm3leon_jax.importing import importer


@dataclasses.dataclass(frozen=True)
class Flags(flag.Fields):
  source: str = ""
  """Folder of the checkpoint."""


def main(settings: Settings, workdir: epath.Path, flags: Flags) -> None:
  if not flags.source:
    raise UserError("name the folder of the checkpoint: --source=DIR.")
  result = importer.plan(settings, flags.source)
  for line in importer.write(settings, workdir, result):
    print(f"import_weights: {line}", flush=True)
  needed = importer.flags(result.fields, common.changed_fields())
  print(
    "import_weights: the next stages, and `cm3leon train` with this --workdir, start from it"
    + (f" and need {needed}" if needed else "."),
    flush=True,
  )


if __name__ == "__main__":
  common.run(main, Flags)
