"""Exports to Hugging Face: `opt` as OPTForCausalLM, `modern` as Qwen3ForCausalLM.

Both load without remote code. If `model.align_images` is set, the default positions of an export
give the decoder's logits only if a sample has at most one image. After neighbors, or in a document
with several images, callers must pass `position_ids` (`positions.positions_of`). config.json
contains a note about this.
"""

# K layers, D width, N heads, H head size, F feed-forward, V vocabulary, T tokens.

from collections.abc import Sequence
import dataclasses
import functools
import importlib.resources
import importlib.util

from etils import epath
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32
import numpy as np

from cm3leon_jax.config.model import ModelConfig
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.decoding.request import unconditional_prompt
from cm3leon_jax.export import published_layout
from cm3leon_jax.export.formats import TrainedRun
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.mesh import batch_shards, shard
from cm3leon_jax.models import transformer
from cm3leon_jax.positions import positions_of
from cm3leon_jax.run import initial
from cm3leon_jax.tokenizers import text
from cm3leon_jax.vocab import VocabLayout
from cm3leon_jax.weights import int8, layouts, tensor_files
from cm3leon_jax.weights.layouts import hf_config
from cm3leon_jax.weights.stored import StoredParams, of_tree
from cm3leon_jax.weights.tensor_files import Tensor

WEIGHTS = tensor_files.WEIGHTS
SCRIPT = "custom_generate.py"  # Copied to exports, where it does not need this package.


def write(folder: epath.PathLike, run: TrainedRun) -> dict:
  """Writes a run for `transformers.AutoModelForCausalLM` and `AutoTokenizer`. See `export`."""
  settings, choice = run.settings, run.choice
  script = epath.Path(folder) / "custom_generate" / "generate.py"
  script.parent.mkdir(parents=True, exist_ok=True)
  script.write_text(importlib.resources.files(__package__).joinpath(SCRIPT).read_text("utf-8"))
  if (published := initial.published_of(run.trained.folder)) is not None:
    return published_layout.write(folder, run, published, _text_to_image(settings))
  described = hf_config(settings.model, settings.vocab)
  described["cm3leon"] |= _text_to_image(settings)
  tensors = tensors_of(run.params, settings.model, choice.dtype)
  count = sum(tensor.size for tensor in tensors)
  if choice.quantize:
    described["quantization_config"] = int8.CONFIG
    tensors = int8.quantized(tensors)
  tokenizer = run.text_tokenizer
  numbers = write_model(folder, described, tensors, settings.vocab, tokenizer, choice.dtype)
  return {**numbers, "parameters": count}


def _text_to_image(settings: Settings) -> dict:
  """Returns what custom_generate.py reads from `cm3leon` in config.json."""
  names = ("guidance_schedule", "temperature", "top_k", "top_p")
  sampling = {name: getattr(settings.sampling, name) for name in names}
  return {
    "image_tokens": settings.vqgan.image_tokens,
    "unconditional_prompt": unconditional_prompt(settings.vocab).tolist(),
    "text_to_image": {"guidance_scale": settings.sampling.guidance, **sampling},
  }


def tensors_of(params: StoredParams, config: ModelConfig, dtype: str = "float32") -> list[Tensor]:
  """Lists the tensors of the Hugging Face model. Raises UserError if a decoder is not supported."""
  layout = layouts.layout_of(config)
  layout.check(config)
  return layouts.tensors_of(layout, params, dtype)


def export(
  folder: epath.PathLike,
  params: dict,
  config: ModelConfig,
  vocab: VocabLayout,
  tokenizer_folder: epath.PathLike | None,
  dtype: str = "float32",
  shard_bytes: int = tensor_files.SHARD_BYTES,
) -> dict:
  """Writes files for `transformers.AutoModelForCausalLM` and `AutoTokenizer`, without torch.

  Deletes the weights of an earlier export first and writes the new weights last, so that an
  unfinished export has no weights.

  Args:
    folder: where to write model.safetensors, config.json, generation_config.json and the
      tokenizer's files.
    tokenizer_folder: folder of the text tokenizer; None omits the tokenizer.
    dtype: dtype of the weights in the file, a key of `tensor_files.DTYPES`.
    shard_bytes: see `tensor_files.write`.

  Returns:
    {"architecture", "parameters", "bytes"}.

  Raises:
    UserError: the Hugging Face model does not support the decoder.
  """
  tensors = tensors_of(of_tree(params), config, dtype)
  described = hf_config(config, vocab)
  return write_model(folder, described, tensors, vocab, tokenizer_folder, dtype, shard_bytes)


def write_model(
  folder: epath.PathLike,
  described: dict,
  tensors: Sequence[Tensor],
  vocab: VocabLayout,
  tokenizer_folder: epath.PathLike | None,
  dtype: str,
  shard_bytes: int = tensor_files.SHARD_BYTES,
) -> dict:
  """Writes the files of a model for `transformers`. Returns the result of `export`.

  `described` is the content of config.json, without the dtype. For the other arguments, see
  `export` and `tensor_files.write`.
  """
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  tensor_files.remove(folder)
  write_json(folder / "config.json", {**described, "dtype": dtype})
  # A document ends with </s>, and an infill (a caption or an answer) with <eoss>. config.json can
  # name only one of these ids. generation_config.json has both, so it must not be marked as derived
  # from config.json ("_from_model_config").
  ids: dict[str, int | list[int]] = {"pad_token_id": vocab.pad, "bos_token_id": vocab.eos}
  ids["eos_token_id"] = [vocab.eos, vocab.eoss]
  write_json(folder / "generation_config.json", ids)
  if tokenizer_folder is not None:
    text.copy_files(tokenizer_folder, folder)
  files = tensor_files.write(folder, tensors, shard_bytes)
  return {
    "architecture": described["architectures"][0],
    "parameters": sum(tensor.size for tensor in tensors),
    "bytes": sum((folder / name).stat().length for name in files),
  }


def can_compare(quantized: str = "") -> bool:
  """Returns whether the packages that load an export (extra `[dev]`) are installed."""
  more = ("compressed_tensors",) if quantized else ()
  return all(importlib.util.find_spec(name) for name in ("torch", "transformers", *more))


@functools.partial(jax.jit, static_argnums=0)
def causal_logits(
  config: ModelConfig, params: dict, tokens: Int32[Array, " T"], positions: Int32[Array, " T"]
) -> Float32[Array, "T V"]:
  """Computes the logits of one sample on the current mesh."""
  model = transformer.bind(config, params)
  tokens = shard(jnp.broadcast_to(tokens[None], (batch_shards(), tokens.size)), "batch", "length")
  positions = jnp.broadcast_to(positions[None], tokens.shape)
  hidden = model(tokens, shard(positions, "batch", "length"), jnp.ones_like(tokens))
  logits = transformer.logits(hidden, model.output_table())
  return shard(logits, None, "length", "vocab")[0]


def compare_logits(
  folder: epath.PathLike,
  params: dict,
  config: ModelConfig,
  samples: Sequence[np.ndarray],
  ids: np.ndarray | None = None,
) -> dict:
  """Compares the fp32 logits of the exported model with those of this project's model.

  Both models get the positions of `positions_of`. Requires `can_compare()`. `params` must be on the
  current mesh. Each sample is a vector of token ids, int32 [T], T <= max_positions. `ids` has the
  export's id of each of our ids, for a `published_layout`.

  Returns:
    {"max_difference", "max_logit", "samples", "tokens"}: the largest absolute difference of logits,
    the largest absolute logit for comparison, and the numbers of samples and tokens.
  """
  import torch
  import transformers

  classes = transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText
  model = classes[ids is not None].from_pretrained(str(folder), dtype=torch.float32).eval()
  config = dataclasses.replace(config, dtype="float32", attention="plain")
  described = read_json(epath.Path(folder) / "config.json", {"cm3leon": dict})["cm3leon"]
  vocab = layouts.vocab_of(described)
  longest = max(len(s) for s in samples)
  difference, largest = 0.0, 0.0
  for sample in samples:
    positions = positions_of(sample, vocab, config.align_images)
    renumbered = sample if ids is None else ids[sample]
    given = (torch.from_numpy(x.astype(np.int64))[None] for x in (renumbered, positions))
    fields = dict(zip(("input_ids", "position_ids"), given))
    with torch.no_grad():
      if ids is None:
        theirs = model(**fields).logits[0].numpy()
      else:  # The class masks the logits of image codes.
        theirs = model.lm_head(model.model(**fields)[0])[0].numpy()[:, ids]
    # Pad all samples to one length, so that only one program is compiled. A causal model ignores
    # padding at the end.
    padded = (np.pad(x, (0, longest - len(sample))) for x in (sample, positions))
    ours = np.asarray(causal_logits(config, params, *padded))[: len(sample)]
    difference = max(difference, float(np.abs(ours - theirs).max()))
    largest = max(largest, float(np.abs(ours).max()))
  return {
    "max_difference": difference,
    "max_logit": largest,
    "samples": len(samples),
    "tokens": sum(map(len, samples)),
  }
