"""Writes the format `peft`: the adapters of a run, without its base.

  peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), FOLDER)

BASE is the base of the adapters, exported in the format hf. CM3Leon.load(BASE, adapter=FOLDER) adds
the adapters to the run, bundle or export that they were trained on.
"""

import dataclasses

from etils import epath
import jax
import numpy as np

from cm3leon_jax.config import UserError
from cm3leon_jax.export.formats import TrainedRun
from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.models.adapters import TABLES, add_rows, count
from cm3leon_jax.models.config import AdapterConfig
from cm3leon_jax.trained import adapters, initial, kinds
from cm3leon_jax.trained.run import Run
from cm3leon_jax.weights import adapter_tensors, layouts, stored, tensor_files

_CARD = """# Adapters of a CM3Leon decoder

Low-rank adapters (rank {rank}, step {step}) that cm3leon_jax trained on `{base}`. Export that model
by `cm3leon export` in the format hf to a folder BASE. With `torch`, `transformers` and `peft`:
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), ".")
```
With cm3leon_jax: `CM3Leon.load("{base}", adapter=".")`.
"""


def adapters_of(run: Run) -> adapters.Adapters:
  """Returns the adapters of a run. Raises UserError if it has none."""
  found = adapters.of_run(run.folder) if run.kind == "workdir" else None
  if found is None:
    raise UserError(
      f"--format is peft, but {run.folder} contains no adapters: choose another --format, or the "
      "workdir of a run with config.adapter.rank > 0."
    )
  return found


def open_params(run: Run, average: bool | None) -> stored.StoredParams:
  """Opens the adapters of a run, which needs a current mesh. For `average`, see `stored.choose`.

  If rows of token tables are trained, loads the base to add them to it.
  """
  found = adapters_of(run)
  chosen = adapters.choose(found, average)
  params, step = found.load(chosen.step, average is not False)
  if found.config.tokens:
    params |= {adapter_tensors.SUMS: sums(initial.load_base(found), params, found.config)}
  return stored.of_tree(params, step, chosen.averaged)


def sums(base: dict, params: dict, config: AdapterConfig) -> dict[str, np.ndarray]:
  """Returns the rows of the token tables that are trained, after the training."""
  tables = {name: x for name, x in add_rows(base, params, config).items() if name in TABLES}
  ids = list(config.ids(len(base["embed"])))
  return {name: jax.device_get(x)[ids] for name, x in tables.items() if name in params}


def write(folder: epath.PathLike, run: TrainedRun) -> dict:
  """Writes adapter_config.json, README.md, and the adapters last, in adapter_model.safetensors.

  export.json also names the base.
  """
  folder = epath.Path(folder)
  found = adapters_of(run.trained)
  model, config = found.settings.model, found.config
  names = adapter_tensors.modules(model)
  described = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": found.base.source,
    "r": config.rank,
    "lora_alpha": config.alpha,
    "lora_dropout": 0.0,
    "target_modules": [names[name].rpartition(".")[2] for name in config.matrices(model)],
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
  }
  if config.tokens:
    tables = [layouts.layout_of(model).tables[name] for name in TABLES if name in run.params.shapes]
    ids = config.ids(model.vocab_size)
    described["trainable_token_indices"] = {path.rpartition(".")[2]: ids for path in tables}
    rows = adapter_tensors.rows_of(run.params, run.choice.dtype)
    tensor_files.write_file(folder / adapter_tensors.ROWS, rows)
  write_json(folder / kinds.ADAPTER, described)
  about = {"base": dataclasses.asdict(found.base)}
  write_json(folder / kinds.ABOUT, {**run.about, **about})
  card = _CARD.format(rank=config.rank, step=run.params.step, base=found.base.source)
  with replacing(folder / "README.md", "w") as file:
    file.write(card)
  tensors = adapter_tensors.tensors_of(model, run.params, run.choice.dtype)
  tensor_files.write_file(folder / adapter_tensors.FILE, tensors)
  size = (folder / adapter_tensors.FILE).stat().length
  return {"parameters": count(model, config), "bytes": size}
