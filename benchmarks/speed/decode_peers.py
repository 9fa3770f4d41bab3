"""Decodes with guidance in torch and transformers, in fp32 on a CPU.

These decoders are the peers in `decode`. All peers read the same weights in the layout
of `cm3leon_jax.export.huggingface`. They compute the logits of the whole vocabulary for each token,
while this project's decoder computes only the logits of image ids. Waiting torch threads spin,
which costs milliseconds per matrix product when another process uses a core.
`OMP_WAIT_POLICY=passive`, set before torch is imported, prevents this.
"""

# B prompts, R = 2B rows (conditional, then unconditional), P tokens of a padded prompt, I new
# tokens, L length, T = P + I cache entries, K layers, D width, N heads, H head size, V vocabulary.

from collections.abc import Sequence
import functools

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.speed.decode_model import Peer
from cm3leon_jax.config.model import ModelConfig
from cm3leon_jax.config.sampling import SamplingConfig
from cm3leon_jax.decoding.request import unconditional_prompt
from cm3leon_jax.vocab import VocabLayout
from cm3leon_jax.weights import layouts
from cm3leon_jax.weights.stored import of_tree

# Ways in which the torch loop multiplies by weights. "linear": F.linear. "transposed": the
# transposed product, up to twice as fast for few rows. "packed": weights in the layout of oneDNN,
# which torch.compile also uses for frozen weights (the operators have no public name).
PRODUCTS = ("linear", "transposed", "packed")


def opt_arrays(params: dict) -> dict[str, np.ndarray]:
  """Returns name -> array for the tensors of OPTForCausalLM."""
  return {
    tensor.name: tensor.make()
    for tensor in layouts.tensors_of(layouts.LAYOUTS["opt"], of_tree(params))
  }


class TorchDecoder:
  """Decoder of family `opt` in torch with a static cache; `product` is one of `PRODUCTS`."""

  def __init__(self, tensors: dict[str, np.ndarray], config: ModelConfig, product: str, rows: int):
    self.config = config

    def read(name: str):
      return torch.from_numpy(tensors[f"model.decoder.{name}.weight"])

    self.embed = read("embed_tokens")
    self.positions = read("embed_positions")[layouts.LAYOUTS["opt"].first_position :].contiguous()
    self.layers = []
    for i in range(config.num_layers):
      qkv = torch.cat([read(f"layers.{i}.self_attn.{name}_proj") for name in "qkv"])
      others = [read(f"layers.{i}.{name}") for name in ("self_attn.out_proj", "fc1", "fc2")]
      self.layers.append([_linear(w, product, rows) for w in (qkv, *others)])
    self.head = _linear(self.embed, product, rows)

  def empty_cache(self, rows: int, entries: int):
    """Returns uninitialized keys and values, [2, K, R, N, T, H]."""
    return torch.empty(
      2, self.config.num_layers, rows, self.config.num_heads, entries, self.config.head_dim
    )

  def __call__(self, tokens, positions, mask, cache, entry: int):
    """Reads L tokens per row into the cache, and returns the logits after the last token.

    Args:
      tokens: [R, L] int64.
      positions: [R, L] int64, index of each token within its sample.
      mask: [R, 1, L or 1, entry + L] fp32, added to the scores.
      cache: result of `empty_cache`, written in place.
      entry: first cache entry to write.

    Returns:
      [R, V] fp32.
    """
    rows, length = tokens.shape
    end, width = entry + length, self.config.width
    x = (self.embed[tokens] + self.positions[positions]).view(-1, width)
    norm = functools.partial(F.layer_norm, normalized_shape=(width,), eps=1e-5)
    for layer, (qkv, out, up, down) in enumerate(self.layers):
      heads = qkv(norm(x)).view(rows, length, 3, self.config.num_heads, self.config.head_dim)
      q, k, v = heads.permute(2, 0, 3, 1, 4)
      cache[0, layer, :, :, entry:end], cache[1, layer, :, :, entry:end] = k, v
      keys, values = cache[:, layer, :, :, :end]
      attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
      x = x + out(attended.transpose(1, 2).reshape(-1, width))
      x = x + down(F.relu(up(norm(x))))
    return self.head(norm(x.view(rows, length, width)[:, -1]))


def _linear(weight, product: str, rows: int):
  """Returns a function [R, in] -> [R, out] that multiplies by `weight`; see `PRODUCTS`."""
  if product == "packed":
    weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
  if product == "transposed":
    return lambda x: (weight @ x.T).T.contiguous()
  return lambda x: F.linear(x, weight)


def pad_left(prompts: Sequence[np.ndarray], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
  """Pads prompts on the left; returns [R, length] int32 ids and a bool mask, False for padding."""
  tokens, valid = (
    np.full((len(prompts), length), pad, np.int32),
    np.zeros((len(prompts), length), bool),
  )
  for row, prompt in enumerate(prompts):
    tokens[row, length - len(prompt) :] = prompt
    valid[row, length - len(prompt) :] = True
  return tokens, valid


def sample_ids(logits, sampling: SamplingConfig, generator):
  """Samples ids [B] from logits [R, V], conditional rows first: guidance, top-k, then top-p."""
  conditional, unconditional = logits.chunk(2)
  guided = torch.lerp(unconditional, conditional, sampling.guidance) / sampling.temperature
  values, ids = torch.topk(guided, min(sampling.top_k, guided.shape[1]))
  probabilities = F.softmax(values, dim=-1)
  before = probabilities.cumsum(-1) - probabilities
  # multinomial normalizes the probabilities.
  choice = torch.multinomial(
    probabilities.masked_fill(before >= sampling.top_p, 0), 1, generator=generator
  )
  return ids.gather(1, choice)[:, 0]


def torch_loop(
  tensors: dict[str, np.ndarray],
  config: ModelConfig,
  vocab: VocabLayout,
  new_tokens: int,
  sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (frozen)
  product: str = "linear",
  batch: int = 4,
) -> Peer:
  """Returns a decoder with a plain torch loop: static cache, both streams in one batch.

  Args:
    tensors: result of `opt_arrays`.
    config: config of the model, family `opt`.
    vocab: layout of the ids.
    new_tokens: I, the number of tokens sampled for every prompt; no sample ends early.
    sampling: settings of the sampler; top_k must be at least 1.
    product: one of `PRODUCTS`.
    batch: number of prompts for which the "packed" layout is optimized; other numbers work, too.
  """
  model = TorchDecoder(tensors, config, product, 2 * batch)

  @torch.inference_mode()
  def run(prompts, seed):
    rows = [*prompts, *[unconditional_prompt(vocab)] * len(prompts)]
    longest = max(map(len, rows))
    tokens, valid = map(torch.from_numpy, pad_left(rows, longest, vocab.pad))
    lengths = valid.sum(1)
    # Finite, because the result of a padding query, which sees no key, would otherwise be NaN.
    hidden = torch.finfo(torch.float32).min
    mask = torch.zeros(len(rows), 1, 1, longest + new_tokens)
    mask[..., :longest].masked_fill_(~valid[:, None, None], hidden)
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    prompt_mask = mask[..., :longest].masked_fill(~causal, hidden)
    cache, generator = (
      model.empty_cache(len(rows), longest + new_tokens),
      torch.Generator().manual_seed(seed),
    )
    positions = (valid.cumsum(1) - 1).clamp(min=0)
    logits = model(tokens.long(), positions, prompt_mask, cache, 0)
    sampled = torch.empty(len(prompts), new_tokens, dtype=torch.long)
    for t in range(new_tokens):
      ids = sample_ids(logits, sampling, generator)
      sampled[:, t] = ids
      if t + 1 < new_tokens:
        end = longest + t + 1
        logits = model(
          ids.repeat(2)[:, None], (lengths + t)[:, None], mask[..., :end], cache, longest + t
        )
    return sampled.numpy()

  return run


def transformers_generate(
  folder,
  vocab: VocabLayout,
  new_tokens: int,
  sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (frozen)
) -> Peer:
  """Returns a decoder with `OPTForCausalLM.generate`, whose guidance runs the streams in sequence.

  It uses `sdpa` and a static cache, a few percent faster than eager attention or a growing cache.
  The cache of the unconditional stream always grows.

  Args:
    folder: folder that `huggingface.export` wrote.
    vocab: layout of the ids.
    new_tokens: I, the number of tokens sampled for every prompt; no sample ends early.
    sampling: settings of the sampler; top_k must be at least 1.
  """
  import transformers

  model = transformers.OPTForCausalLM.from_pretrained(
    str(folder), dtype=torch.float32, attn_implementation="sdpa"
  ).eval()

  @torch.inference_mode()
  def run(prompts, seed):
    longest = max(map(len, prompts))
    tokens, valid = map(torch.from_numpy, pad_left(prompts, longest, vocab.pad))
    negative = torch.from_numpy(np.stack([unconditional_prompt(vocab)] * len(prompts)))
    torch.manual_seed(seed)
    ids = model.generate(
      tokens.long(),
      attention_mask=valid.long(),
      negative_prompt_ids=negative.long(),
      negative_prompt_attention_mask=torch.ones_like(negative).long(),
      guidance_scale=sampling.guidance,
      do_sample=True,
      temperature=sampling.temperature,
      top_k=sampling.top_k,
      top_p=sampling.top_p,
      min_new_tokens=new_tokens,
      max_new_tokens=new_tokens,
      cache_implementation="static",
    )
    return ids[:, longest:].numpy()

  return run
