"""Generates token ids for requests, batch by batch. Other packages decode with `Generator`."""

# I tokens of an image.

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import itertools
from typing import Any, Literal, TypedDict

import jax
import numpy as np

from cm3leon_jax.config.model import ModelConfig
from cm3leon_jax.config.sampling import SamplingConfig
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.decoding import batch as batch_lib
from cm3leon_jax.decoding import cache, grammar
from cm3leon_jax.decoding import params as params_lib
from cm3leon_jax.decoding import programs as compile_lib
from cm3leon_jax.decoding.batch import Batch
from cm3leon_jax.decoding.control import control_of
from cm3leon_jax.decoding.grammar import Grammar
from cm3leon_jax.decoding.loop import Static
from cm3leon_jax.decoding.request import Request
from cm3leon_jax.decoding.result import Result, cut, sample_seed
from cm3leon_jax.decoding.sampling.methods import is_contrastive
from cm3leon_jax.decoding.sampling.rows import Sampler
from cm3leon_jax.errors import UserError
from cm3leon_jax.mesh import batch_shards
from cm3leon_jax.vocab import VocabLayout

# Width from which CPUs are faster with `Transposed` matrices. With 192, they are 6 to 12% slower.
WIDE = 512


class LoadOptions(TypedDict, total=False):
  """Fields of `GeneratorConfig` that `CM3Leon.load` accepts."""

  batch_size: int
  weight_dtype: Literal["compute", "int8"]
  cache_dtype: Literal["compute", "int8"]


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
  """Settings that are compiled into a `Generator`.

  Attributes:
    positions: largest number of positions of a sample, at most `model.max_positions`. Positions
      after the longest training sample are untrained.
    weight_dtype: `compute`, or `int8` for the matrices of the blocks.
    cache_dtype: `compute` or `int8`.
    image_head: whether to compute only the logits of image codes while only image codes are legal.
  """

  model: ModelConfig
  vocab: VocabLayout
  image_tokens: int
  positions: int
  sampling: SamplingConfig = SamplingConfig()  # noqa: RUF009 (frozen)
  batch_size: int = 16
  weight_dtype: str = "compute"
  cache_dtype: str = "compute"
  image_head: bool = True

  def __post_init__(self) -> None:
    for field, allowed in (("weight_dtype", params_lib.DTYPES), ("cache_dtype", cache.DTYPES)):
      if getattr(self, field) not in allowed:
        raise ValueError(
          f"{field} is '{getattr(self, field)}'; it must be one of {', '.join(allowed)}."
        )
    if self.batch_size < 1:
      raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1.")

  @classmethod
  def of(cls, settings: Settings, **fields: Any) -> "GeneratorConfig":
    """Makes the config for a run's settings; `fields` are further fields of this class."""
    image_tokens, positions = settings.vqgan.image_tokens, settings.data.sequence_length
    return cls(settings.model, settings.vocab, image_tokens, positions, settings.sampling, **fields)

  def batch(
    self,
    requests: Sequence[Request],
    seeds: Sequence[int],
    contrastive: Sequence[bool] | None = None,
    sampling: SamplingConfig | None = None,
  ) -> tuple[Batch, Static]:
    """Makes the arrays of a batch on the current mesh, and the static arguments of its programs.

    `requests`, `seeds` and `contrastive` have one element per sample. All requests have the same
    number of streams. By default, samples use top-p, and `sampling` defaults to the config's.
    Requests are repeated until the batch has the size that `batch.rounded` returns.
    """
    sampling = sampling or self.sampling
    contrastive = contrastive or [False] * len(requests)
    devices, align_images = batch_shards(), self.model.align_images
    rows = [i % len(requests) for i in range(batch_lib.rounded(len(requests), devices))]
    repeated = [requests[i] for i in rows]
    read = [x for r in repeated for x in batch_lib.prompts_of(r, self.vocab, align_images)]
    prompts = batch_lib.prompt_arrays(read, self.vocab.pad, devices)
    control = control_of(
      repeated,
      [seeds[i] for i in rows],
      [contrastive[i] for i in rows],
      sampling,
      self.image_tokens,
    )
    widths = batch_lib.stream_widths(prompts, len(requests[0].streams))
    most = max(grammar.max_new_tokens(r.plan) for r in requests)
    capacities = compile_lib.cache_capacities(max(widths), most)
    compiled = self.model, Grammar(self.vocab, self.image_tokens), Sampler.of(sampling)
    return Batch(prompts, control), Static(*compiled, self.cache_dtype, widths, most, capacities)


class Generator:
  """Generates samples for requests.

  A generator compiles once per bucket of prompt length, result length and batch size.

  with jax.set_mesh(create_mesh(MeshConfig())):
    generator = Generator(params, GeneratorConfig.of(settings))
    [result] = generator.generate([request.text_to_image(vocab, 256, caption)], seeds=[0])
    image_tokenizer.decode(result.codes(vocab)[None])
  """

  def __init__(self, params: dict, config: GeneratorConfig):
    """Prepares the parameters of a model for decoding. Needs a current mesh."""
    self.config, mesh = config, jax.sharding.get_mesh()
    self.params = params_lib.prepare(
      params,
      config=config.model,
      vocab=config.vocab,
      dtype=config.weight_dtype,
      image_head=config.image_head,
      transposed=mesh.devices.flat[0].platform == "cpu" and config.model.width >= WIDE,
    )
    self.programs = compile_lib.programs_of(mesh)

  def generate(
    self, requests: Sequence[Request], seeds: Sequence[int], **options: Any
  ) -> list[Result]:
    """Returns the results of all batches, ordered by request and sample; see `batches`."""
    return list(itertools.chain.from_iterable(self.batches(requests, seeds, **options)))

  def batches(
    self,
    requests: Sequence[Request],
    seeds: Sequence[int],
    samples: int = 1,
    sampling: SamplingConfig | None = None,
    progress: Callable[[int], None] = lambda steps: None,
  ) -> Iterator[list[Result]]:
    """Yields the results of each batch, in the order of the requests.

    Args:
      seeds: an integer in [0, 2^32) for each request. With the same seed, a request gives the same
        samples in any batch.
      samples: number of samples per request.
      sampling: sampling settings; default: the config's. Only a new top_k, method or contrastive_k
        causes recompilation.
      progress: a function that is called with the number of steps since its last call.

    Raises:
      UserError: there is no request, a seed is missing, or a request needs more positions than were
        trained. It is raised before anything is compiled.
    """
    for request in requests:
      self.check(request)
    sampling = sampling or self.config.sampling
    streams = [len(request.streams) for request in requests]
    todo = list(itertools.product(range(len(requests)), range(samples)))
    for _, group in itertools.groupby(todo, key=lambda x: len(requests[x[0]].streams)):
      alike = list(group)
      for start in range(0, len(alike), self.config.batch_size):
        batch = alike[start : start + self.config.batch_size]
        seeds_of = [sample_seed(seeds[i], s) for i, s in batch]
        used = [
          is_contrastive(sampling.method, seed, streams[i]) for (i, _), seed in zip(batch, seeds_of)
        ]
        ids, log_probs, divergence = self._generate_batch(
          [requests[i] for i, _ in batch], seeds_of, used, sampling, progress
        )
        yield [
          Result.of(
            place,
            seeds_of[row],
            used[row],
            *cut(ids[row], log_probs[row], self.config.vocab.pad),
            divergence[row],
            streams[place[0]],
            self.config.vocab,
          )
          for row, place in enumerate(batch)
        ]

  def check(self, request: Request) -> None:
    """Raises UserError if a request needs more positions than were trained."""
    following, positions = grammar.max_new_tokens(request.plan), self.config.positions
    if request.positions > positions:
      raise UserError(
        f"a prompt has {request.positions - following} tokens; the maximum is "
        f"{positions - following}, since {following} more tokens must fit into the {positions} "
        "trained positions: shorten it, or retrieve fewer documents."
      )

  def _generate_batch(
    self,
    requests: Sequence[Request],
    seeds: Sequence[int],
    contrastive: Sequence[bool],
    sampling: SamplingConfig,
    progress: Callable[[int], None],
  ) -> list[np.ndarray]:
    """Generates a batch of requests with the same number of streams.

    Returns [ids, log_probs, divergence].
    """
    batch, static = self.config.batch(requests, seeds, contrastive, sampling)
    params, control, programs = self.params, batch.control, self.programs
    loop, steps = programs.prefill(params, batch, static)
    done, capacity = 0, min(static.capacities[0], static.max_new_tokens)
    for larger in [*static.capacities[1:], None]:
      finished = False
      while done < capacity and not finished:
        loop = steps(params, control, loop)
        before, done = done, int(jax.device_get(loop.count))
        finished = done < min(before + compile_lib.CHUNK, capacity)
        progress(done - before)
      if finished or larger is None:
        break
      loop, steps = programs.grow(loop, larger - capacity, params, control, static)
      capacity = larger
    return [x[: len(requests)] for x in jax.device_get(programs.results(loop))]
