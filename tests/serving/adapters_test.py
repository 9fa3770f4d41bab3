"""Serves a model with adapters, which requests select by `model`."""

import base64
import copy

import jax
import pytest

from cm3leon_jax import loading
from cm3leon_jax.config import UserError
from cm3leon_jax.decoding.generator import Generator
from cm3leon_jax.serving.engine import Engine
from tests.models.tiny import random_params
from tests.refusals import refused
from tests.serving.conftest import LIMITS
from tests.serving.live import Live


@pytest.mark.slow
def test_requests_select_adapters_by_model(model, run):
  pipeline = copy.copy(model.pipeline)
  with jax.set_mesh(model.mesh):
    config = pipeline.generator.config
    pipeline.adapted = {"other": Generator(random_params(config.model, seed=9), config)}
  engine = Engine(pipeline, model.mesh, slots=3, chunk=4)
  engine.start()
  assert engine.wait_until_ready()
  body = {"prompt": "a red apple", "seed": 3, "retrieve": 0, "response_format": "b64_json"}
  with Live(engine, LIMITS, secret=str(run)) as live:
    assert [m["id"] for m in live.http.get("/v1/models").json()["data"]] == ["tiny", "other"]
    assert live.http.get("/v1/models/other").json()["id"] == "other"
    images = []
    for name in (None, "tiny", "other"):
      answer = live.http.post("/v1/images/generations", json={**body, "model": name})
      images.append(base64.b64decode(answer.json()["data"][0]["b64_json"]))
    wrong = live.http.post("/v1/images/generations", json={**body, "model": "third"})
  assert images[0] == images[1] != images[2]
  assert wrong.status_code == 404
  message = wrong.json()["error"]["message"]
  assert message == "this server has only the models tiny, other: name one, or leave model out."
  assert engine.close(seconds=60)


@pytest.mark.parametrize("given", [["name"], ["=f"], ["a/b=f"], ["a=f", "a=g"], ["model=f"]])
def test_wrong_names_of_adapters_are_refused(given):
  with refused(UserError):
    loading.adapters_of(given, "model")
