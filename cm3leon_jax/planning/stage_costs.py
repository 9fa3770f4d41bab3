"""Estimates the costs of each stage of a run: chip-hours for models, core-hours for data."""

from collections.abc import Iterator, Sequence
import dataclasses
import math

from etils import epath
import jax
import jax.numpy as jnp
from jaxtyping import Array

from cm3leon_jax.clip import checkpoint
from cm3leon_jax.clip import model as clip_lib
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.models import nnx_params
from cm3leon_jax.planning.hardware import Hardware, peak_of
from cm3leon_jax.planning.plan import Plan
from cm3leon_jax.stages.table import STAGES
from cm3leon_jax.tokenizers import published, vqgan

# Rates measured in docs/benchmarks.md (two cores of an AMD EPYC machine) and docs/pods.md.
INGESTED = 108  # Images ingested per core and second.
READ = 360  # Images read per core and second.
ENCODED = 2_600_000  # Text tokens encoded per core and second.
INDEXED = 1_000_000 / 201  # Vectors indexed per core and second.
# Queries per core and second, and the number of vectors among which they search.
SEARCHED, SEARCHED_OF = 1_628, 1_000_000
SQRT_UNTIL = 144_000_000  # Up to this block size, query time grows with sqrt(vectors).
PRUNED = 6_900  # Documents pruned per core and second.
MERGED, MERGED_SECONDS = 100_000_000, 91  # BPE: characters, core-seconds.
CAPTION_TOKENS = 24
# Published image tokenizers compute in fp32: platform -> how many times slower its products are. A
# TPU computes them as six products in bfloat16; an H100 has 67 TFLOP/s, in bfloat16 989.
FP32_SLOWER = {"tpu": 6, "gpu": 15}
SOURCE = "two cores of an AMD EPYC machine, docs/benchmarks.md"


@dataclasses.dataclass(frozen=True)
class Cost:
  """Costs of a stage. `basis` is a text that explains how they were computed."""

  stage: str
  core_hours: float
  chip_hours: float
  basis: str


def pairs_of_a_pass(settings: Settings) -> int:
  """Returns how many captioned images a run needs if it reads each image once as a document.

  Each document has `data.num_neighbors` neighbors. A neighbor has as many tokens as a document.
  """
  tokens = settings.train.steps * settings.train.global_batch_size * settings.data.sequence_length
  document = settings.vqgan.image_tokens + CAPTION_TOKENS + 2  # <break> after each part.
  share = 1 - settings.data.text_share
  return round(tokens * share / (document * (1 + settings.data.num_neighbors)))


def estimate(settings: Settings, plan: Plan, pairs: int) -> Iterator[Cost]:
  """Estimates the costs of all stages up to training, in the order in which they run.

  Published models replace the stages that train an image tokenizer and CLIP.
  """
  hw, share = plan.hardware, f"{plan.mfu:.0%} of the peak"
  train = Cost("train", 0.0, plan.chip_hours, f"the plan above, at {plan.step_mfu:.0%} of the peak")
  if settings.instructions.any:
    yield train
    return
  encode = image_tokenizer_flops(settings, vqgan.encode)
  image, text, model = embedding_flops(settings)

  def chips(flops: float) -> float:
    return flops / (peak_of(hw.device_kind) * hw.devices_per_chip * plan.mfu) / 3600

  def cores(amount: float, rate: float) -> float:
    return amount / rate / 3600

  yield Cost("prepare_data", cores(pairs, INGESTED), 0.0, f"{INGESTED} images/s a core")
  basis = f"a subset of {MERGED / 1e6:g} million characters, on one host (docs/pods.md)"
  yield Cost("train_text_tokenizer", MERGED_SECONDS / 3600, 0.0, basis)
  if not (settings.vqgan.published or settings.vqgan.source):
    images = settings.vqgan.steps * settings.vqgan.batch_size
    flops = encode + image_tokenizer_flops(settings, vqgan.decode)
    basis = f"{images:,} images, 3 x {flops / 1e9:.0f} GFLOP, at {share}"
    hours = chips(3 * images * flops)
    yield Cost("train_vqgan", 0.0, hours, basis + _on_one_host(hw, "vqgan", hours))
  slower = FP32_SLOWER.get(hw.platform, 1) if settings.vqgan.published else 1
  remark = f", {slower} times slower in fp32" if slower > 1 else ""
  texts = settings.data.text_share * plan.tokens
  yield Cost(
    "encode_documents",
    cores(pairs, READ) + cores(texts, ENCODED),
    chips(slower * pairs * encode),
    f"{READ} images/s and {ENCODED / 1e6:g} million tokens of text/s a core; "
    f"{encode / 1e9:.0f} GFLOP an image, at {share}{remark}",
  )
  if not settings.retrieval.clip:
    seen = settings.clip.steps * settings.clip.batch_size
    basis = f"{seen:,} pairs, 3 x {(image + text) / 1e9:.0f} GFLOP, at {share}"
    hours = chips(3 * seen * (image + text))
    yield Cost("train_clip", 0.0, hours, basis + _on_one_host(hw, "clip", hours))
  yield Cost(
    "build_neighbors",
    cores(pairs, READ) + search_hours(pairs, settings.retrieval.index_rows),
    chips(pairs * (image + 2 * text)),
    f"ScaNN, {SEARCHED:,} queries/s a core at {SEARCHED_OF / 1e6:g} million vectors, two a pair in "
    f"each block of {settings.retrieval.index_rows:,}; {(image + 2 * text) / 1e9:.0f} GFLOP a pair"
    f"{model}",
  )
  yield train


def _on_one_host(hardware: Hardware, stage: str, hours: float) -> str:
  """Returns the end of `Cost.basis` for a stage on one host: its days, and a replacement."""
  if hardware.hosts == 1:
    return ""
  days = hours / hardware.per_host / 24
  return f"; on one host only, {days:,.1f} days, or none with {STAGES[stage].instead}"


def search_hours(pairs: int, block: int) -> float:
  """Computes the core-hours to index, search and prune; docs/pods.md lists the parts."""
  rows = min(block, pairs)
  slower = math.sqrt(min(rows, SQRT_UNTIL) / SEARCHED_OF) * max(1.0, rows / SQRT_UNTIL)
  queries = 2 * pairs * math.ceil(pairs / block)
  seconds = pairs / INDEXED + queries * slower / SEARCHED + pairs / PRUNED
  return seconds / 3600


def image_tokenizer_flops(settings: Settings, function: jax.stages.Wrapped) -> float:
  """Returns the FLOPs of `vqgan.encode` or `vqgan.decode` for one image, as counted by XLA."""
  own, codes = settings.vqgan, settings.vocab.image_size
  config: vqgan.Config = own
  if own.published:
    sizes = published.FAMILIES[own.published]
    config = dataclasses.replace(sizes, resolution=own.resolution)
    params = nnx_params.to_dict(published.structure(config, codes)[1])
  else:
    params = jax.eval_shape(lambda key: vqgan.init_params(own, codes, key), jax.random.key(0))
  side = config.resolution
  argument = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)
  if function is vqgan.decode:
    argument = jax.ShapeDtypeStruct((1, config.image_tokens), jnp.int32)
  return _flops(function.lower(config, codes, params, argument))


def embedding_flops(settings: Settings) -> tuple[float, float, str]:
  """Returns the FLOPs to embed (one image, one caption), and a remark for `Cost.basis`.

  The sizes of a published CLIP are read from its folder. If the folder is not on this machine, the
  sizes are those of the section `clip`.
  """
  folder = settings.retrieval.clip
  if folder and (epath.Path(folder) / checkpoint.CONFIG).exists():
    return *published_clip_flops(checkpoint.read_config(folder)), f" with the CLIP of {folder}"
  remark = f", by the sizes of config.clip, because {folder} is not on this machine"
  return *clip_flops(settings), remark if folder else ""


def published_clip_flops(config: checkpoint.HFCLIPConfig) -> tuple[float, float]:
  """Returns the FLOPs to embed (one image, one caption) with a published CLIP."""

  def encoder(sizes: checkpoint.EncoderSizes, length: int) -> float:
    width, mlp = sizes.width, sizes.mlp_width
    products = 4 * width**2 + 2 * width * mlp + 2 * length * width
    return 2.0 * sizes.layers * length * products

  patches = (config.resolution // config.patch) ** 2
  folded = 2 * patches * 3 * config.patch**2 * config.image.width
  return folded + encoder(config.image, patches + 1), encoder(config.text, config.text_length)


def clip_flops(settings: Settings) -> tuple[float, float]:
  """Returns the FLOPs to embed (one image, one caption) with the CLIP that the run trains."""
  config, size = settings.clip, settings.vocab.text_size
  params = jax.eval_shape(lambda key: clip_lib.init_params(config, size, key), jax.random.key(0))
  side = config.resolution
  image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)
  text = jax.ShapeDtypeStruct((1, config.text_length), jnp.int32)

  def embed_image(params: dict, x: Array) -> Array:
    return clip_lib.bind(config, size, params).embed_images(vqgan.to_float(x))

  def embed_text(params: dict, x: Array) -> Array:
    return clip_lib.bind(config, size, params).embed_texts(x)

  image_flops = _flops(jax.jit(embed_image).lower(params, image))
  return image_flops, _flops(jax.jit(embed_text).lower(params, text))


def _flops(lowered: jax.stages.Lowered) -> float:
  return float(lowered.cost_analysis()["flops"])


def table(costs: Sequence[Cost], plan: Plan, pairs: int, of_a_pass: int) -> str:
  """Formats the costs of all stages and how they were computed, one stage per line.

  `of_a_pass` is the result of `pairs_of_a_pass`, which a user may have replaced by `pairs`.
  """
  unit = "GPU-hours" if plan.hardware.platform == "gpu" else "chip-hours"
  origin = "one pass of the run's tokens; --pairs=N gives another number"
  if pairs != of_a_pass:
    times = of_a_pass / pairs
    origin = f"--pairs; the run reads each {times:,.1f} times, for one pass it needs {of_a_pass:,}"
  lines = [f"stages, estimates for {pairs:,} pairs ({origin})"]
  for cost in costs:
    lines.append(f"  {cost.stage:<22}{_hours(cost.core_hours, cost.chip_hours, unit)}{cost.basis}")
  total = sum(c.core_hours for c in costs), sum(c.chip_hours for c in costs)
  lines.append(
    f"  {'together':<22}{_hours(*total, unit)}rates of a core were measured on {SOURCE}; FLOPs are "
    "XLA's; without samples, evaluation, export and restarts; near duplicates are not removed: do "
    "so before prepare_data"
  )
  return "\n".join(lines)


def _hours(core_hours: float, chip_hours: float, unit: str) -> str:
  numbers = ((core_hours, "core-hours"), (chip_hours, unit))
  shown = [(f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}", name) for hours, name in numbers]
  found = [f"{hours} {name}" for hours, name in shown if hours != "0"]
  return f"{' and '.join(found)}: " if found else ""
