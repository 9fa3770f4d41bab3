"""Generates images by `model.generate` of transformers, with both guidance streams in one batch.

  ids = model.generate(prompts, custom_generate=DIR, trust_remote_code=True, seed=0)

`cm3leon export` writes this file to DIR/custom_generate/generate.py. It needs only torch and
transformers. The field `cm3leon` of config.json has the run's settings. If it has `image_ids`, DIR
has the ids of a published Chameleon, whose class masks the logits of image codes: the script reads
the decoder and its head below the mask.
"""

# B prompts, P tokens of the longest prompt, R rows of both streams, I codes per image, V codes.

import inspect
import math
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache


@torch.no_grad()
def generate(
  inputs: torch.Tensor | None = None,
  *,
  model: Any,
  input_ids: torch.Tensor | None = None,
  attention_mask: torch.Tensor | None = None,
  position_ids: torch.Tensor | None = None,
  negative_prompt_ids: torch.Tensor | None = None,
  negative_prompt_attention_mask: torch.Tensor | None = None,
  do_sample: bool = True,
  seed: int | None = None,
  **settings: float | str | None,
) -> torch.Tensor:
  """Generates an image for each prompt `</s> caption <break>`, on the model's device.

  The prompts of a Chameleon are `<s> caption <reserved08706> <racm3:break>`.

  Args:
    inputs: prompts [B, P], padded on the left; the same as `input_ids`.
    attention_mask: [B, P], 0 for padding; default: 1 for all ids except `<pad>`.
    position_ids: [B, P]; needed if config.json has `cm3leon.position_ids` and prompts have images.
    negative_prompt_ids: [B, _] or [1, _], padded on the left; default: the unconditional prompt.
    do_sample: False always takes the most probable code.
    seed: row i uses `seed + i`, so its noise does not depend on other rows; None: a random seed.
    **settings: `guidance_scale`, `guidance_schedule` (constant, linear or cosine), `temperature`,
      `top_k` (0 keeps all), `top_p`; default: the settings of the run.

  Returns:
    Prompts and image codes, int64 [B, P + I]. Code c is the id `cm3leon.text_size` + c. For a
    Chameleon, [B, P + I + 1]: code c is the id `cm3leon.image_ids[c]`, and `<eoss>` is the last.

  Raises:
    ValueError: an argument is unknown or wrong.
  """
  own = model.config.cm3leon
  chosen = _chosen(own["text_to_image"], settings) | ({} if do_sample else {"top_k": 1})
  prompts: Any = input_ids if inputs is None else inputs
  if getattr(prompts, "ndim", 0) != 2:
    raise ValueError("give prompts, a tensor of token ids with two axes.")
  streams = [(prompts, attention_mask)]
  if chosen["guidance_scale"] != 1:
    given = negative_prompt_ids is not None
    negative = negative_prompt_ids if given else torch.tensor([own["unconditional_prompt"]])
    streams.append((negative, negative_prompt_attention_mask))
  ids, mask = _joined(streams, model)
  positions = (mask.cumsum(1) - 1).clamp(min=0)
  if position_ids is not None:
    positions[: len(prompts), -position_ids.shape[1] :] = position_ids
  elif own.get("align_images") and (ids >= own["text_size"]).any():
    raise ValueError("a prompt has images: pass position_ids, see config.json.")
  seed = int(torch.randint(2**31, ())) if seed is None else seed
  generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
  codes = _decode(model, ids, mask, positions, generators, chosen)
  end = codes.new_tensor([own.get("after_image", [])]).expand(len(codes), -1)
  return torch.cat([prompts.to(codes), codes, end], 1)


def _decode(
  model: Any,
  ids: torch.Tensor,
  mask: torch.Tensor,
  positions: torch.Tensor,
  generators: list,
  settings: dict,
) -> torch.Tensor:
  """Decodes the image of each generator; returns ids [B, I]. The other tensors are [R, P]."""
  own, rows, drawn = model.config.cm3leon, len(generators), []
  codes = own.get("image_ids") or range(own["text_size"], own["text_size"] + own["image_size"])
  codes = torch.tensor(codes, device=model.device)
  decoder = model.model  # Chameleon's own forward masks the logits of all codes.
  # Versions of transformers name this argument differently.
  named = "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"
  options = {named: DynamicCache(config=model.config), "use_cache": True}
  scale, schedule = settings["guidance_scale"], settings["guidance_schedule"]
  for weight in _weights(scale, schedule, own["image_tokens"]):
    hidden = decoder(input_ids=ids, attention_mask=mask, position_ids=positions, **options)[0]
    logits = model.lm_head(hidden[:, -1])[:, codes].float()
    conditional, unconditional = logits[:rows], logits[-rows:]
    guided = unconditional + weight * (conditional - unconditional)
    drawn.append(codes[_sample(guided, generators, settings)])
    ids = drawn[-1].repeat(len(ids) // rows, 1)
    mask, positions = pad(mask, (0, 1), value=1), positions[:, -1:] + 1
  return torch.cat(drawn, 1)


def _chosen(defaults: dict, given: dict) -> dict:
  """Returns the settings of a call. `given` are its other arguments; None is a default."""
  given = {name: value for name, value in given.items() if value is not None}
  if unknown := sorted(given.keys() - defaults.keys()):
    raise ValueError(
      f"{', '.join(unknown)}: not known to custom_generate, which generates only images; its "
      f"settings are do_sample, seed, {', '.join(defaults)}."
    )
  chosen = defaults | given
  scale, temperature = chosen["guidance_scale"], chosen["temperature"]
  top_k, top_p = chosen["top_k"], chosen["top_p"]
  if not (scale >= 0 and temperature > 0 and top_k >= 0 and 0 < top_p <= 1):
    raise ValueError(
      f"guidance_scale is {scale}, temperature {temperature}, top_k {top_k}, top_p {top_p}; they "
      "must be at least 0, positive, at least 0, and above 0 to 1."
    )
  return chosen


def _weights(scale: float, schedule: str, count: int) -> list[float]:
  """Returns the guidance weight of each code, as `cm3leon generate` computes it."""
  steps = torch.linspace(0, 1, count, dtype=torch.float64)
  ramps = {"constant": steps * 0 + 1, "linear": steps, "cosine": (1 - (math.pi * steps).cos()) / 2}
  if schedule not in ramps:
    raise ValueError(f"guidance_schedule is {schedule!r}; it must be {', '.join(ramps)}.")
  return (1 + (scale - 1) * ramps[schedule]).tolist()


def _joined(streams: list, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
  """Pads (ids, mask or None) of all streams to one width; returns ids and mask [R, P]."""
  rows, own = len(streams[0][0]), model.config.cm3leon
  width = max(ids.shape[1] for ids, _ in streams)
  joined = []
  for ids, mask in streams:
    mask = (ids != own.get("pad", 0)).long() if mask is None else mask
    if ids.shape != mask.shape or len(ids) not in (1, rows) or not mask[:, -1].all():
      raise ValueError(
        f"prompts {list(ids.shape)} and their mask {list(mask.shape)} must have 1 or {rows} rows, "
        "padded on the left (padding_side='left')."
      )
    joined.append([pad(x.expand(rows, -1), (width - x.shape[1], 0)) for x in (ids, mask)])
  ids, mask = (torch.cat(x).to(model.device) for x in zip(*joined))
  most = model.config.max_position_embeddings - own["image_tokens"]
  if (longest := int(mask.sum(1).max())) > most:
    raise ValueError(
      f"a prompt has {longest} tokens; the maximum is {most}, so that the image after it fits into "
      "the positions of the model: shorten the caption."
    )
  return ids, mask


def _sample(logits: torch.Tensor, generators: list, settings: dict) -> torch.Tensor:
  """Samples one code per row of logits [B, V] by top-k, then top-p; returns int64 [B, 1]."""
  values, codes = (logits / settings["temperature"]).sort(descending=True, stable=True)
  values = values[:, : settings["top_k"] or None]
  before = values.softmax(-1).cumsum(-1) - values.softmax(-1)
  if settings["top_p"] < 1:
    values = values.masked_fill(before >= settings["top_p"], -torch.inf)
  # On the CPU, so a seed gives the same noise on all devices.
  noise = [torch.rand(values.shape[1], generator=g, dtype=torch.float64) for g in generators]
  gumbel = -(-torch.stack(noise).log()).log()
  return codes.gather(1, (values + gumbel.to(values)).argmax(-1, keepdim=True))
