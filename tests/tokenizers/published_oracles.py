"""Makes published image tokenizers in torch, with random weights, as references.

aMUSEd is `diffusers.VQModel`, and Janus transformers' JanusVQVAE; LlamaGen has other names of it.
Chameleon is transformers' ChameleonVQVAE, which has no decoder, with the decoder of Janus. Janus
counts levels from the lowest resolution, and has an additional attention layer after each block of
that level (`level_attention`).
"""

import dataclasses
import re

import numpy as np
import pytest

from cm3leon_jax.tokenizers.published import FAMILIES, PublishedConfig

torch = pytest.importorskip("torch")
normalize = torch.nn.functional.normalize


def small(family: str, **fields) -> PublishedConfig:
  """Returns a family's config with fewer levels and channels, and one code per 4 x 4 pixels."""
  values = {"resolution": 32, "widths": (32, 64, 96), "latent_channels": 12, "code_dim": 8}
  return dataclasses.replace(FAMILIES[family], **values | fields)


def randomize(model, seed: int) -> None:
  """Draws all parameters such that no layer is the identity, and outputs are not tiny.

  The exception is `conv_in`: the variance of its output is close to the epsilon of the norms.
  """
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, value in model.named_parameters():
      if value.ndim == 4:
        value.normal_(0, value[0].numel() ** -0.5, generator=generator)
      elif value.ndim == 2:
        value.normal_(0, 1, generator=generator)
      else:
        value.normal_(0, 0.3, generator=generator).add_(
          float("norm" in name and name.endswith("weight"))
        )
      if "conv_in." in name:
        value.mul_(1e-3)


class Amused:
  """Reference for aMUSEd: encoder and decoder of `diffusers.VQModel`."""

  lowest = 0  # Pipelines of aMUSEd use pixels in [0, 1].

  def __init__(self, config: PublishedConfig, num_codes: int):
    import diffusers

    self.code_dim, levels = config.code_dim, len(config.widths)
    self.model = diffusers.VQModel(
      block_out_channels=config.widths,
      down_block_types=("DownEncoderBlock2D",) * levels,
      up_block_types=("UpDecoderBlock2D",) * levels,
      layers_per_block=config.blocks,
      latent_channels=config.latent_channels,
      vq_embed_dim=config.code_dim,
      norm_num_groups=config.groups,
      num_vq_embeddings=num_codes,
      mid_block_add_attention=False,
      lookup_from_codebook=True,
    ).eval()
    self.modules = (self.model,)

  def tensors(self):
    return self.model.state_dict()

  def distances(self, pixels):
    """Maps pixels [B, H, W, 3] in [0, 1] to distances of all codes [B, h, w, K]."""
    z = self.model.encode(pixels.permute(0, 3, 1, 2)).latents.permute(0, 2, 3, 1)
    return torch.cdist(z.reshape(-1, self.code_dim), self.model.quantize.embedding.weight).reshape(
      *z.shape[:3], -1
    )

  def encode(self, pixels):
    latents = self.model.encode(pixels.permute(0, 3, 1, 2)).latents
    return self.model.quantize(latents)[2][2].reshape(-1, *latents.shape[2:])

  def decode(self, codes):
    shape = (*codes.shape, self.code_dim)
    decoded = self.model.decode(codes.reshape(-1), force_not_quantize=True, shape=shape)
    return decoded.sample.permute(0, 2, 3, 1)


def janus_sizes(config: PublishedConfig, num_codes: int) -> dict:
  """Returns fields of JanusVQVAEConfig and ChameleonVQVAEConfig."""
  width = config.widths[0]
  return {
    "embed_dim": config.code_dim,
    "num_embeddings": num_codes,
    "latent_channels": config.latent_channels,
    "base_channels": width,
    "channel_multiplier": tuple(w // width for w in config.widths),
    "num_res_blocks": config.blocks,
  }


class Janus:
  """Reference for Janus and LlamaGen.

  LlamaGen's release normalizes encodings and codes. JanusVQVAE normalizes codes only in `decode`,
  so `encode` here sets normalized codes, whose order does not depend on the encoding's length.
  """

  lowest = -1

  def __init__(self, config: PublishedConfig, num_codes: int):
    import transformers

    self.is_llamagen = config.family == "llamagen"
    sizes = janus_sizes(config, num_codes)
    self.model = transformers.JanusVQVAE(transformers.JanusVQVAEConfig(**sizes)).eval()
    self.modules = (self.model,)

  def tensors(self):
    tensors = self.model.state_dict()
    if not self.is_llamagen:
      return tensors
    places = {"down": "conv_blocks", "up": "conv_blocks", "block": "res"}
    places |= {"block_1": "0", "attn_1": "1", "block_2": "2"}
    return {
      ".".join(places.get(part, part) for part in name.split(".")): value
      for name, value in tensors.items()
    }

  def distances(self, pixels):
    """Maps pixels [B, H, W, 3] in [-1, 1] to distances [B, h, w, K] of unit vectors."""
    z = self.model.quant_conv(self.model.encoder(pixels.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    z, table = normalize(z, dim=-1), normalize(self.model.quantize.embedding.weight, dim=-1)
    return torch.cdist(z.reshape(-1, z.shape[-1]), table).reshape(*z.shape[:3], -1)

  def encode(self, pixels):
    table = self.model.quantize.embedding.weight
    stored = table.clone()
    table.copy_(normalize(stored, dim=-1))
    found = self.model.encode(pixels.permute(0, 3, 1, 2))
    table.copy_(stored)
    return found.image_tokens.reshape(-1, *found.last_hidden_state.shape[2:])

  def decode(self, codes):
    self.model.quantize.quant_state_dims = list(codes.shape[1:])
    return self.model.decode(codes.flatten(1)).permute(0, 2, 3, 1)


class Chameleon:
  """Reference for Chameleon: ChameleonVQVAE and Janus' decoder."""

  lowest = -1

  def __init__(self, config: PublishedConfig, num_codes: int):
    import transformers
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

    self.attention, self.last = config.level_attention, len(config.widths) - 1
    sizes = janus_sizes(config, num_codes)
    lowest = config.resolution // config.downsample
    places = {"resolution": config.resolution}
    places["attn_resolutions"] = [lowest] if self.attention else None
    self.model = ChameleonVQVAE(transformers.ChameleonVQVAEConfig(**sizes, **places)).eval()
    janus = transformers.JanusVQVAE(transformers.JanusVQVAEConfig(**sizes)).eval()
    self.decoder = janus.decoder
    self.modules = (self.model, self.decoder)

  def silence_attention(self):
    """Disables the attention layers that Janus' decoder has and Chameleon's lacks."""
    with torch.no_grad():
      for attention in self.decoder.up[0].attn:
        attention.proj_out.weight.zero_()
        attention.proj_out.bias.zero_()

  def tensors(self):
    tensors = dict(self.model.state_dict())
    for name, value in self.decoder.state_dict().items():
      if self.attention or ".attn." not in name:
        level = re.sub(r"^up\.(\d+)", lambda m: f"up.{self.last - int(m[1])}", name)
        tensors[f"decoder.{level}"] = value
    return tensors

  def distances(self, pixels):
    """Maps pixels [B, H, W, 3] in [-1, 1] to distances [B, h, w, K]."""
    z = self.model.quant_conv(self.model.encoder(pixels.permute(0, 3, 1, 2)))
    z, table = z.permute(0, 2, 3, 1), self.model.quantize.embedding.weight
    return torch.cdist(z.reshape(-1, z.shape[-1]), table).reshape(*z.shape[:3], -1)

  def encode(self, pixels):
    size = [side // 2**self.last for side in pixels.shape[1:3]]
    return self.model.encode(pixels.permute(0, 3, 1, 2)).image_tokens.reshape(-1, *size)

  def decode(self, codes):
    z = self.model.quantize.embedding(codes).permute(0, 3, 1, 2)
    return self.decoder(self.model.post_quant_conv(z)).permute(0, 2, 3, 1)


def build(config: PublishedConfig, num_codes: int):
  classes = {"amused": Amused, "chameleon": Chameleon, "llamagen": Janus, "janus": Janus}
  return classes[config.family](config, num_codes)


def make(config: PublishedConfig, num_codes: int, seed: int = 0):
  oracle = build(config, num_codes)
  for i, module in enumerate(oracle.modules):
    randomize(module, seed + i)
  if isinstance(oracle, Chameleon) and not config.level_attention:
    oracle.silence_attention()
  return oracle


def to_pixels(images: np.ndarray, lowest: int):
  pixels = torch.tensor(images).to(torch.float32) / 255
  return pixels if lowest == 0 else 2 * pixels - 1
