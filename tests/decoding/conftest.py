"""Defines fixtures: generators with random weights, on one device."""

import pytest

from tests.decoding.small import MIXTURE, model_config, on_mesh, small_generator
from tests.models.tiny import random_params


@pytest.fixture(scope="session")
def params():
  with on_mesh():
    return random_params(model_config())


@pytest.fixture(scope="session")
def generator(params):
  with on_mesh():
    return small_generator(params=params, sampling=MIXTURE, batch_size=4)


@pytest.fixture(scope="session")
def plain_generator(params):
  """Returns a generator that always computes logits of all ids, so its programs are smaller."""
  with on_mesh():
    return small_generator(params=params, sampling=MIXTURE, batch_size=4, image_head=False)


@pytest.fixture
def one_device():
  with on_mesh():
    yield
