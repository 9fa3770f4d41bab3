"""Writes the format `peft`: the adapters of a run, without its base.

  peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), FOLDER)

BASE is the base of the adapters, exported in the format hf. For a Chameleon, BASE is the imported
folder, and the class is ChameleonForConditionalGeneration.
"""

# R rank.

import dataclasses

from etils import epath

from cm3leon_jax.config.model import AdapterConfig, ModelConfig
from cm3leon_jax.errors import UserError
from cm3leon_jax.export.formats import TrainedRun
from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.models.adapters import count
from cm3leon_jax.run import adapters, initial, source
from cm3leon_jax.run.run import Run
from cm3leon_jax.weights import reading, stored, tensor_files
from cm3leon_jax.weights.layouts import QKV, layout_of, transposed
from cm3leon_jax.weights.tensor_files import Tensor

FILE = "adapter_model.safetensors"

_CARD = """# Adapters of a CM3Leon decoder

Low-rank adapters (rank {rank}, step {step}) that cm3leon_jax trained on `{base}`. BASE is
{folder}. With `torch`, `transformers` and `peft`:
```python
from peft import PeftModel
from transformers import {name}

model = PeftModel.from_pretrained({name}.from_pretrained("BASE"), ".")
```
"""
_EXPORTED = "a folder to which `cm3leon export` writes that model in the format hf"


def adapters_of(run: Run) -> adapters.Adapters:
  """Returns the adapters of a run. Raises UserError if it has none."""
  result = adapters.of_run(run.folder) if run.kind == "workdir" else None
  if result is None or not isinstance(result.config, AdapterConfig):
    raise UserError(
      f"--format is peft, but {run.folder} contains no adapters: choose another --format, or the "
      "workdir of a run with config.adapter.rank > 0."
    )
  return result


def open_params(run: Run, average: bool | None) -> stored.StoredParams:
  """Opens the adapters of a run, which needs a current mesh. For `average`, see `stored.choose`."""
  result = adapters_of(run)
  chosen = reading.open_params(result.folder / "train", average=average)
  params, step = result.load(chosen.step, average is not False)
  return stored.of_tree(params, step, chosen.averaged)


def modules(model: ModelConfig) -> dict[str, str]:
  """Maps each matrix of a layer to its module in transformers, relative to the layer."""
  layout = layout_of(model)
  return {**dict(zip("qkv", QKV)), "out": layout.out, **layout.products}


def tensors_of(model: ModelConfig, params: stored.StoredParams, dtype: str) -> list[Tensor]:
  """Lists the tensors of adapters: for each matrix, lora_A [R, in] and lora_B [out, R]."""
  layers, tensors = f"base_model.model.{layout_of(model).prefix}.layers", []
  for layer in range(model.num_layers):
    for name, module in modules(model).items():
      for factor in "ab" if f"{name}.a" in params.shapes else "":
        source = f"{name}.{factor}"
        axes_in = len(params.shapes[source]) - 2 if factor == "a" else 1
        theirs = f"{layers}.{layer}.{module}.lora_{factor.upper()}.weight"
        tensors.append(transposed(theirs, params, source, layer, dtype=dtype, axes_in=axes_in))
  return tensors


def write(folder: epath.PathLike, run: TrainedRun) -> dict:
  """Writes adapter_config.json, README.md, and the adapters last, in adapter_model.safetensors.

  export.json also names the base.
  """
  folder = epath.Path(folder)
  result = adapters_of(run.trained)
  model, config = result.settings.model, result.settings.adapter
  names = modules(model)
  described = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": result.base.source,
    "r": config.rank,
    "lora_alpha": config.alpha,
    "lora_dropout": 0.0,
    "target_modules": [names[name].rpartition(".")[2] for name in config.matrices(model)],
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
  }
  write_json(folder / source.ADAPTER, described)
  about = {"base": dataclasses.asdict(result.base)}
  write_json(folder / source.ABOUT, {**run.about, **about})
  published = initial.published_of(run.trained.folder)
  card = _CARD.format(
    rank=config.rank,
    step=run.params.step,
    base=result.base.source,
    folder="the folder that was imported" if published else _EXPORTED,
    name=layout_of(model).architecture if published else "AutoModelForCausalLM",
  )
  with replacing(folder / "README.md", "w") as file:
    file.write(card)
  tensor_files.write_file(folder / FILE, tensors_of(model, run.params, run.choice.dtype))
  size = (folder / FILE).stat().length
  return {"parameters": count(model, config), "bytes": size}
