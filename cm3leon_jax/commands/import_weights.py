"""Imports trained weights from a local folder, so that a run starts from them.

  cm3leon import_weights --config=cm3leon_350m --workdir=runs/from_text \\
    --source=DIR

DIR holds safetensors, config.json and tokenizer.json: what cm3leon export wrote, or a text model,
Qwen3ForCausalLM or OPTForCausalLM without biases. What cannot be imported exactly is refused with
its reason, and nothing is downloaded. The command writes text_tokenizer/ and init/ in the workdir;
the stages after it and cm3leon train then begin with them, on any mesh. It names the flags that set
fields of the config to what the model needs.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from absl import flags

from cm3leon_jax.commands import common
from cm3leon_jax.config import UserError

if TYPE_CHECKING:
  from etils import epath

  from cm3leon_jax.settings import Settings

_SOURCE = flags.DEFINE_string(
  "source",
  "",
  "Folder of the checkpoint.",
  allow_override=True,  # In one process of tests cm3leon import_vqgan has such a flag, too.
)


def main(settings: Settings, workdir: epath.Path, source: str, given: Collection[str] = ()) -> None:
  """Imports the weights and prints what was done.

  Args:
    settings: of the run.
    workdir: of the run.
    source: folder of the checkpoint.
    given: fields of the config that flags of this command set, e.g. "model.width": the flags that
      the next commands need, too.
  """
  from cm3leon_jax.importing import importer

  if not source:
    raise UserError("name the folder of the checkpoint: --source=DIR.")
  found = importer.plan(settings, source)
  with common.writing("import"):
    lines = importer.write(settings, workdir, found)
  for line in lines:
    print(f"import_weights: {line}", flush=True)
  needed = importer.flags(found.fields, given)
  print(
    "import_weights: the next stages, and `cm3leon train` with this --workdir, begin with it"
    + (f" and need {needed}" if needed else "."),
    flush=True,
  )


if __name__ == "__main__":
  common.run(
    lambda settings, workdir: main(settings, workdir, _SOURCE.value, common.given_fields()),
    begins=True,
  )
