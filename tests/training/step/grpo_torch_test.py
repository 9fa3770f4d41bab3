"""Compares an update of `grpo.policy_step` with one that torch computes from its definition."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from cm3leon_jax.export import huggingface
from cm3leon_jax.training.config import OptimizerConfig
from cm3leon_jax.training.step import grpo
from cm3leon_jax.training.step.optimizer import create_optimizer
from cm3leon_jax.training.step.state import TrainState
from tests.models.tiny import mesh_of, random_params
from tests.training.step.grpo_test import IMAGE, VOCAB, WEIGHTS, model_config, rollout_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MODEL = model_config("opt")
REWARDS = np.float32([[0, 1], [1, 1], [0.5, 0], [-1, 3]])
KL_WEIGHT, TEMPERATURE, RATE = 0.3, 0.7, 0.5
# With a small eps, Adam's first update would be the sign of a gradient, which noise can change.
ADAM = {"b1": 0.9, "b2": 0.95, "eps": 1.0}


def exported(params, folder):
  huggingface.export(folder, params, MODEL, VOCAB, None)
  return transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()


def stream_logits(model, rollout):
  """Returns the logits of image codes, [8, 2, I, C], computed without padding."""
  found = []
  for row, segment in itertools.product(range(8), (1, 2)):
    used = rollout.segment_ids[row] == segment
    ids = torch.from_numpy(rollout.inputs[row][used]).long()[None]
    found.append(model(ids).logits[0, -IMAGE:, VOCAB.text_size :])
  return torch.stack(found).reshape(8, 2, IMAGE, -1)


def policy(logits):
  guided = WEIGHTS[0].item() * logits[:, 0] + WEIGHTS[1].item() * logits[:, 1]
  return torch.log_softmax(guided / TEMPERATURE, -1)


def updated_by_torch(model, reference, rollout):
  rewards = torch.from_numpy(REWARDS)
  advantages = (rewards - rewards.mean(1, keepdim=True)).reshape(8, 1)
  codes = torch.from_numpy(rollout.codes).long()[..., None]
  with torch.no_grad():
    of_reference = policy(stream_logits(reference, rollout))
  log_probs = policy(stream_logits(model, rollout))
  chosen = log_probs.gather(-1, codes)[..., 0]
  kl = (of_reference.exp() * (of_reference - log_probs)).sum(-1).mean()
  loss = -(advantages * chosen).mean() + KL_WEIGHT * kl
  betas = (ADAM["b1"], ADAM["b2"])
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=RATE, betas=betas, eps=ADAM["eps"], weight_decay=0.0
  )
  loss.backward()
  optimizer.step()
  return {name: x.detach().numpy() for name, x in model.state_dict().items()}, loss.item()


def updated(rollout, folder):
  """Returns the parameters after `policy_step` as written tensors, by name, and the loss."""
  optimizer = create_optimizer(
    OptimizerConfig(learning_rate=RATE, warmup_steps=0, clip_norm=1e9, weight_decay=0.0, **ADAM), 10
  )
  with jax.set_mesh(mesh_of(1, 1, 1)):
    params, reference = random_params(MODEL), random_params(MODEL, seed=1)
    state = TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))
    fixed = (MODEL, optimizer, VOCAB.text_size, KL_WEIGHT, TEMPERATURE)
    step = jax.jit(functools.partial(grpo.policy_step, *fixed))
    new, metrics = step(state, reference, grpo.place(rollout))
    huggingface.export(folder, new.params, MODEL, VOCAB, None)
  return safetensors_numpy.load_file(folder / huggingface.WEIGHTS), float(metrics["loss"])


def largest_difference(found, expected):
  assert found.keys() <= expected.keys()
  return max(np.abs(x - expected[name]).max() for name, x in found.items())


def test_an_update_equals_that_of_torch(tmp_path):
  rollout = rollout_of("opt", grpo.advantages(REWARDS).reshape(-1))
  with jax.set_mesh(mesh_of(1, 1, 1)):
    model = exported(random_params(MODEL), tmp_path / "model")
    reference = exported(random_params(MODEL, seed=1), tmp_path / "reference")
  before = safetensors_numpy.load_file(tmp_path / "model" / huggingface.WEIGHTS)
  expected, loss = updated_by_torch(model, reference, rollout)
  found, ours = updated(rollout, tmp_path / "new")
  assert ours == pytest.approx(loss, rel=1e-5)
  assert largest_difference(before, expected) > 1e-2
  assert largest_difference(found, expected) < 1e-5
  # Negative control: advantages that are divided by the standard deviation of their group.
  std = np.maximum(REWARDS.std(1, keepdims=True), 1e-6)
  divided = rollout._replace(advantages=(grpo.advantages(REWARDS) / std).reshape(-1))
  assert largest_difference(updated(divided, tmp_path / "divided")[0], expected) > 1e-3
