"""Tests that transformers' `generate` draws an export's images as this project does."""

import dataclasses
import importlib.resources
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from cm3leon_jax import CM3Leon
from cm3leon_jax.commands import export
from cm3leon_jax.decoding.sampling import guidance
from cm3leon_jax.decoding.sampling.top_p import filter_candidates
from cm3leon_jax.export import huggingface
from cm3leon_jax.mesh import MeshConfig, create_mesh
from cm3leon_jax.positions import positions_of
from tests.generation.run import SETTINGS, VOCAB, one_device, save_run
from tests.refusals import refused

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from cm3leon_jax.export import custom_generate  # noqa: E402

CODES = SETTINGS.vqgan.image_tokens
CAPTIONS = ["red apple", "house", "a new house and an old blue car"]
PROMPTS = [[VOCAB.eos, *words, VOCAB.brk] for words in ([40, 41, 42], [50], [60, 61, 62, 63, 64])]


def padded(rows):
  longest = max(map(len, rows))
  return torch.tensor([[VOCAB.pad] * (longest - len(row)) + row for row in rows])


def load(folder):
  return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module", params=["opt", "modern"])
def models(request, tmp_path_factory):
  """Yields the folder of an export, transformers' model of it, and ours."""
  root = tmp_path_factory.mktemp("run")
  fields = {"family": request.param, "align_images": request.param == "modern"}
  settings = dataclasses.replace(SETTINGS, model=dataclasses.replace(SETTINGS.model, **fields))
  save_run(root, settings)
  export.main(settings, root, export.Flags())
  mesh, threads = create_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), torch.get_num_threads()
  torch.set_num_threads(1)
  yield root / "export", load(root / "export"), CM3Leon.load(root, mesh=mesh)
  torch.set_num_threads(threads)


def draw(models, ids, **options):
  """Calls `generate` as the model card does; returns image codes."""
  folder, model, _ = models
  found = model.generate(ids, custom_generate=str(folder), trust_remote_code=True, **options)
  assert found.dtype == torch.int64
  torch.testing.assert_close(found[:, : ids.shape[1]], ids)
  return VOCAB.image_codes(found[:, ids.shape[1] :].numpy())


def tokens_of(model, caption):
  return [VOCAB.eos, *model.pipeline.layout.encode(caption).tolist(), VOCAB.brk]


@pytest.mark.parametrize("more", [{}, {"guidance": 7.0, "guidance_schedule": "linear"}])
def test_greedy_codes_are_those_of_this_project(models, more):
  ours = models[2].generate(CAPTIONS, retrieve=0, top_k=1, **more)
  expected = np.array([VOCAB.image_codes(sample.tokens[:CODES]) for [sample] in ours])
  theirs = {"guidance_scale" if key == "guidance" else key: more[key] for key in more}
  ids = padded([tokens_of(models[2], caption) for caption in CAPTIONS])
  assert len({len(tokens_of(models[2], caption)) for caption in CAPTIONS}) == 3
  found = draw(models, ids, do_sample=False, **theirs)
  np.testing.assert_array_equal(found, expected)
  np.testing.assert_array_equal(draw(models, ids, top_k=1, **theirs), expected)
  assert (draw(models, ids, do_sample=False, guidance_scale=1) != expected).any()


def test_prompts_with_documents_take_positions(models):
  """With `position_ids` if positions are counted from images; without them, this is an error."""
  _, model, own = models
  [sample] = own.generate(CAPTIONS[0], retrieve=2, top_k=1)
  [request] = own.requests([dataclasses.replace(sample.task, seed=0)])
  prompt = request.streams[0]
  assert VOCAB.is_image(prompt).any()
  ids = torch.tensor(prompt[None]).long()
  options = {"do_sample": False}
  if model.config.cm3leon["align_images"]:
    with refused(ValueError, "pass position_ids"):
      draw(models, ids, **options)
    aligned = positions_of([*prompt, VOCAB.text_size], VOCAB, True)[:-1]
    options["position_ids"] = torch.tensor(aligned)[None]
  expected = VOCAB.image_codes(sample.tokens[:CODES])
  np.testing.assert_array_equal(draw(models, ids, **options)[0], expected)


def test_negative_prompts_are_those_of_transformers(models):
  model = models[1]
  negative = [[VOCAB.eos, 70, 71, 72, 73, VOCAB.brk]]
  only = {"prefix_allowed_tokens_fn": lambda row, ids: list(range(VOCAB.text_size, VOCAB.size))}
  length = {"min_new_tokens": CODES, "max_new_tokens": CODES, "do_sample": False}
  codes = []
  for prompt in PROMPTS:
    ids, options = torch.tensor([prompt]), {"guidance_scale": 4.0}
    options |= {"negative_prompt_ids": torch.tensor(negative)}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **only, **length, **options)
    codes.append(VOCAB.image_codes(found[0, len(prompt) :].numpy()))
  found = draw(models, padded(PROMPTS), do_sample=False, **options)
  np.testing.assert_array_equal(found, codes)
  assert (draw(models, padded(PROMPTS), do_sample=False, guidance_scale=4.0) != codes).any()


def test_a_row_depends_on_its_seed_only(models):
  found = draw(models, padded(PROMPTS), seed=5)
  np.testing.assert_array_equal(draw(models, padded(PROMPTS), seed=5), found)
  np.testing.assert_array_equal(draw(models, torch.tensor(PROMPTS[1:2]), seed=6)[0], found[1])
  assert (draw(models, padded(PROMPTS), seed=6) != found).any()
  torch.manual_seed(0)
  random = draw(models, padded(PROMPTS))
  assert (draw(models, padded(PROMPTS)) != random).any()


@pytest.mark.parametrize("top_p", [0.8, 1.0])
def test_first_codes_have_the_frequencies_of_our_sampler(models, top_p, monkeypatch):
  """Guided logits agree to 1e-4, and sampled codes by chi-squared; another temperature does not."""
  _, model, own = models
  count, settings = 2_000, {"temperature": 0.7, "top_k": 12, "top_p": top_p}
  seen = []
  sample = custom_generate._sample
  monkeypatch.setattr(
    custom_generate, "_sample", lambda logits, *a: seen.append(logits) or sample(logits, *a)
  )
  model.config.cm3leon["image_tokens"] = 1
  ids = torch.tensor(PROMPTS[:1]).repeat(count, 1)
  try:
    drawn = {
      temperature: custom_generate.generate(
        ids, model=model, seed=1, **settings | {"temperature": temperature}
      )[:, -1].numpy()
      for temperature in (0.7, 1.4)
    }
  finally:
    model.config.cm3leon["image_tokens"] = CODES
  streams = [np.array(PROMPTS[0]), np.array([VOCAB.eos, VOCAB.mask(0), VOCAB.brk])]
  config = own.pipeline.settings.model
  with jax.set_mesh(own.mesh):
    params, _ = own.run.params(own.step)
    both = [huggingface.causal_logits(config, params, x, np.arange(len(x)))[-1:] for x in streams]
  weights = guidance.text_to_image_weights(SETTINGS.sampling.guidance, "constant", 2)[0]
  logits = guidance.combine_streams(jnp.stack(both), jnp.asarray(weights))[:, VOCAB.text_size :]
  logits = np.asarray(logits)
  assert np.abs(logits).max() > 1
  np.testing.assert_allclose(seen[0][:1].numpy(), logits, atol=1e-4)
  assert p_value(drawn[0.7] - VOCAB.text_size, logits, settings) > 1e-3
  assert p_value(drawn[1.4] - VOCAB.text_size, logits, settings) < 1e-6


def p_value(codes, logits, settings):
  """Returns the p-value (chi-squared) of codes under the distribution of this project's sampler."""
  top_k, top_p = (jnp.array([settings[name]]) for name in ("top_k", "top_p"))
  with one_device():
    scaled = jnp.asarray(logits / settings["temperature"])
    values, ids = filter_candidates(scaled, top_k, top_p, 0)
  expected = np.asarray(jax.nn.softmax(values[0]), np.float64) * len(codes) + 1e-9
  counts, usual = np.bincount(codes, minlength=len(expected))[ids[0]], expected > 5
  merged = [np.append(x[usual], x[~usual].sum()) for x in (counts, expected)]
  return stats.chisquare(merged[0], merged[1] * (len(codes) / merged[1].sum())).pvalue


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"max_new_tokens": 4}, "max_new_tokens: not known"),
    ({"temperature": 0}, "temperature 0"),
    ({"top_p": 1.5}, "top_p 1.5"),
    ({"guidance_schedule": "steep"}, "guidance_schedule is"),
    ({"attention_mask": torch.ones(3, 4)}, "their mask"),
    ({"negative_prompt_ids": torch.ones(2, 3)}, "must have 1 or 3 rows"),
    ({"inputs": torch.ones(3)}, "give prompts"),
    ({"inputs": torch.ones(1, SETTINGS.model.max_positions - CODES + 1).long()}, "shorten"),
    ({"inputs": torch.tensor([PROMPTS[0], [*PROMPTS[1], 0, 0]])}, "padded on the left"),
  ],
)
def test_wrong_arguments_are_refused(models, options, message):
  with refused(ValueError, message):
    custom_generate.generate(**{"inputs": padded(PROMPTS), "model": models[1], **options})


def test_the_script_imports_only_what_its_users_have():
  source = importlib.resources.files("cm3leon_jax.export").joinpath(huggingface.SCRIPT).read_text()
  lines = re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE)
  known = {"torch", "transformers", *sys.stdlib_module_names}
  assert {"torch"} <= set(lines) <= known
