"""The decoder as a user calls it: requests in, tokens out, batch by batch."""

# B samples of a batch, S guidance streams, G tokens that are generated, I tokens of an image.

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import itertools

import jax
import numpy as np

from cm3leon_jax.config import UserError
from cm3leon_jax.decoding import batch as batch_lib
from cm3leon_jax.decoding import cache, decode, grammar, programs, weights
from cm3leon_jax.decoding.grammar import Grammar
from cm3leon_jax.decoding.prompts import Request
from cm3leon_jax.decoding.sampling import SamplingConfig, contrastive_rows
from cm3leon_jax.mesh import batch_shards
from cm3leon_jax.models.config import ModelConfig
from cm3leon_jax.vocab import VocabLayout

ROOM = 128  # Tokens that the cache has slots for at first; then it grows, lest attention look at what is not yet filled.
CHUNK = 64  # Tokens between two looks at the device: a progress bar moves, and a batch whose samples are over stops.


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
  """What a Generator is compiled for.

  Attributes:
    model: the decoder.
    vocab: what its ids mean.
    image_tokens: I.
    positions: longest sample, at most model.max_positions; beyond the longest that was trained, positions are noise.
    sampling: how tokens are drawn if a call does not say.
    batch_size: most samples that are drawn at once.
    weight_dtype: `compute`, or `int8` for the products of the blocks.
    cache_dtype: `compute` or `int8`.
    draft_window: codes of an image that are read in a step and accepted as far as they hold (`jacobi`), at least 2, for batches
      of whole images that are drawn by top_p; 0: one code a step. The distribution is the same, the pictures are others.
    image_head: while only image codes may come, only their rows of the output table are computed; False: always all.
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
  draft_window: int = 0

  def __post_init__(self):
    for field, allowed in (("weight_dtype", weights.DTYPES), ("cache_dtype", cache.DTYPES)):
      if getattr(self, field) not in allowed:
        raise ValueError(
          f"{field} is '{getattr(self, field)}'; it must be one of {', '.join(allowed)}."
        )
    if self.draft_window and (self.draft_window < 2 or not self.image_head):
      raise ValueError(
        f"draft_window is {self.draft_window}; it must be 0, or at least 2 with image_head."
      )
    if self.batch_size < 1:
      raise ValueError(f"batch_size is {self.batch_size}; it must be positive.")
    if not 1 <= self.positions <= self.model.max_positions:
      raise ValueError(
        f"positions is {self.positions}; it must lie in [1, model.max_positions = {self.model.max_positions}]."
      )

  @classmethod
  def of(cls, settings, **fields) -> "GeneratorConfig":
    """From the sections of a run's settings."""
    model, image_tokens = settings.model, settings.vqgan.image_tokens
    return cls(
      model,
      settings.vocab,
      image_tokens,
      settings.data.sequence_length,
      settings.sampling,
      **fields,
    )


@dataclasses.dataclass(frozen=True)
class Result:
  """One sample.

  Attributes:
    request: index of its request.
    sample: number of the sample among those of the request.
    seed: that it was drawn with.
    ids: [G] int32, what follows the prompt.
    log_probs: [G] fp32, of each id under the guided distribution, before temperature and filters.
    contrastive: it was drawn by contrastive decoding.
  """

  request: int
  sample: int
  seed: int
  ids: np.ndarray
  log_probs: np.ndarray
  contrastive: bool

  def codes(self, vocab: VocabLayout) -> np.ndarray:
    """Image codes among the ids, int32."""
    return vocab.image_codes(self.ids[vocab.is_image(self.ids)])


def sample_seed(seed: int, sample: int) -> int:
  """The seed of a request's n-th sample; the first has the request's own."""
  return seed if sample == 0 else int(np.random.SeedSequence([seed, sample]).generate_state(1)[0])


def _rooms(prompt: int, longest: int) -> list[int]:
  """How many tokens the cache has room for behind the prompt's slots: it doubles, unless all is less than half as much more.

  >>> _rooms(32, 257), _rooms(32, 1_025), _rooms(896, 257)
  ([128, 257], [128, 288, 608, 1025], [257])
  """
  rooms, slots = [], prompt + ROOM
  while 3 * slots < 2 * (prompt + longest):
    rooms.append(slots - prompt)
    slots *= 2
  return [*rooms, longest]


class Generator:
  """Generates for requests; programs are compiled once per bucket of prompt length, of batch size and of tokens.

  with jax.set_mesh(create_mesh(MeshConfig())):
    generator = Generator(params, GeneratorConfig.of(settings))
    [result] = generator.generate([prompts.text_to_image(vocab, 256, caption)], seeds=[0])
    image_tokenizer.decode(result.codes(vocab)[None])
  """

  def __init__(self, params, config: GeneratorConfig):
    self.config = config
    self.grammar = Grammar(config.vocab, config.image_tokens)
    self.weights = weights.prepare(
      params,
      config=config.model,
      vocab=config.vocab,
      dtype=config.weight_dtype,
      image_head=config.image_head,
    )
    self.programs = programs.of(jax.sharding.get_mesh())

  def generate(self, requests: Sequence[Request], seeds: Sequence[int], **options) -> list[Result]:
    """All results, by request and sample; see `batches`."""
    return list(itertools.chain.from_iterable(self.batches(requests, seeds, **options)))

  def batches(
    self,
    requests: Sequence[Request],
    seeds: Sequence[int],
    samples: int = 1,
    sampling: SamplingConfig | None = None,
    tell: Callable[[int], None] = lambda tokens: None,
  ) -> Iterator[list[Result]]:
    """Draws batch by batch, in the order of the requests; the samples of one share their prefill.

    Args:
      requests: of `prompts`.
      seeds: an integer in [0, 2^32) for each; with the same seed a request gives the same samples in any batch.
      samples: of each request.
      sampling: default: the config's. Its numbers may change without compiling again, but top_k and contrastive_k.
      tell: is called with the number of steps that were made, now and then.

    Raises:
      UserError: no request, one that takes more positions than were trained, or not one seed for each. Before anything is
        compiled.
    """
    if not len(requests) or len(requests) != len(seeds):
      raise UserError(
        f"{len(requests)} prompts and {len(seeds)} seeds: give at least one prompt and one seed for each."
      )
    for request in requests:
      self._check(request)
    sampling = sampling or self.config.sampling
    # Without a stream to contrast it with, a sample is drawn as by top_p.
    contrastive = contrastive_rows(sampling.method, seeds, samples) & np.array(
      [[len(r.streams) > 1] for r in requests]
    )
    todo = [(i, s, len(requests[i].streams)) for i in range(len(requests)) for s in range(samples)]
    for _, alike in itertools.groupby(todo, key=lambda x: x[2]):
      alike = list(alike)
      for start in range(0, len(alike), self.config.batch_size):
        part = [(i, s) for i, s, _ in alike[start : start + self.config.batch_size]]
        drawn = [sample_seed(seeds[i], s) for i, s in part]
        ids, log_probs = self._batch(
          [requests[i] for i, _ in part], drawn, [contrastive[x] for x in part], sampling, tell
        )
        lengths = (ids != self.config.vocab.pad).sum(axis=1)
        yield [
          Result(*x, drawn[row], ids[row, :n], log_probs[row, :n], bool(contrastive[x]))
          for row, (x, n) in enumerate(zip(part, lengths))
        ]

  def _check(self, request: Request) -> None:
    if request.positions > self.config.positions:
      room = self.config.positions - grammar.longest(request.plan)
      raise UserError(
        f"a prompt has {max(len(s) for s in request.streams)} tokens; at most {room} leave room for the "
        f"{grammar.longest(request.plan)} tokens to come in the {self.config.positions} positions that were trained: "
        "shorten it, or retrieve fewer documents."
      )

  def _batch(self, requests, seeds, contrastive, sampling, tell) -> tuple[np.ndarray, np.ndarray]:
    """([B, G] ids, [B, G] log_probs) of requests of one number of streams."""
    config, multiple = self.config, batch_shards()
    rows = np.arange(batch_lib.rounded(len(requests), multiple)) % len(requests)
    repeated = [requests[i] for i in rows]
    prompts = batch_lib.prompt_arrays(
      [s for r in repeated for s in r.streams], config.vocab.pad, multiple
    )
    plan = grammar.plan_array([r.plan for r in repeated])
    control = decode.Control(
      plan,
      np.stack([r.guidance(sampling, config.image_tokens) for r in repeated]),
      np.asarray(seeds, np.uint32)[rows],
      np.asarray(contrastive)[rows],
      sampling.values,
    )
    longest = max(grammar.longest(r.plan) for r in requests)
    widths = batch_lib.stream_widths(prompts, len(requests[0].streams))
    rooms, window, codes = _rooms(max(widths), longest), config.draft_window, int(plan[0, 0, 1])
    drafts = (
      window and sampling.method == "top_p" and (plan[:, 0] == [grammar.CODES, codes, 0]).all()
    )
    if drafts:
      rooms = [max(longest, codes + window)]
    static = {"config": config.model, "grammar": self.grammar}
    of_begin = {
      **static,
      "longest": longest,
      "room": rooms[0],
      "widths": widths,
      "cache_dtype": config.cache_dtype,
    }
    of_advance = {**static, "sampler": decode.Sampler.of(sampling), "steps": CHUNK}
    loop, advance = self.programs.begin(self.weights, prompts, control, of_begin, of_advance)
    done, room = 0, min(rooms[0], longest)
    if drafts:
      of_image = {**static, "sampler": of_advance["sampler"], "codes": codes, "window": window}
      loop, _ = self.programs.draw_image(loop, self.weights, control, advance, of_image)
      done = codes
      tell(codes)
    for larger in [*rooms[1:], None]:
      over = False
      while done < room and not over:
        loop = advance(self.weights, control, loop)
        before, done = done, int(jax.device_get(loop.count))
        over = done < min(before + CHUNK, room)
        tell(done - before)
      if over or larger is None:
        break
      loop, advance = self.programs.grow(loop, larger - room, self.weights, control, of_advance)
      room = larger
    ids, log_probs = jax.device_get(self.programs.outcome(loop))
    return ids[: len(requests)], log_probs[: len(requests)]
