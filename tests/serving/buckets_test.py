import logging
import time

import jax
import pytest

from cm3leon_jax.config.sampling import SamplingConfig
from cm3leon_jax.decoding import request as request_lib
from cm3leon_jax.decoding.continuous.buckets import bucket_of
from cm3leon_jax.serving.engine import Engine
from tests.serving.conftest import LIMITS
from tests.serving.live import Live, about, image, png

pytestmark = pytest.mark.filterwarnings("ignore:(this model|retrieve is) ")
IMAGE = image(0)
CAPTION = "a red apple"


def odd_requests(live):
  """Yields the responses to requests of unusual sizes."""
  for top_k in (0, 2**20):
    yield live.generate(prompt=CAPTION, seed=1, top_k=top_k)
  for words in (1, 90):
    yield live.generate(prompt="car " * words, seed=1, retrieve=0)
    yield live.generate(prompt="car " * min(words, 60), seed=1, retrieve=1, n=3, top_k=100)
  for box in ("0,0,1,1", "1,0,3,8"):
    for prompt in ("", "car " * 40):
      yield live.edit(png(IMAGE), box=box, prompt=prompt, seed="1")
  yield live.edit(png(IMAGE), prompt="car " * 45, seed="1", top_k="1000")
  for length, text in ((1, ""), (55, "car " * 30)):
    yield live.chat(about(IMAGE, text), seed=1, max_tokens=length)
  for masks in (1, 6):
    yield live.chat("<mask> a " * masks, seed=1, max_tokens=2, top_k=1000)


@pytest.fixture
def compiled(caplog):
  """Returns a function that lists the compilations so far, of all threads."""
  jax.config.update("jax_log_compiles", True)
  caplog.set_level(logging.WARNING, "jax")
  yield lambda: [record.message for record in caplog.records if "XLA comp" in record.message]
  jax.config.update("jax_log_compiles", False)


@pytest.fixture
def warm(model):
  engine = Engine(model.pipeline, model.mesh, slots=3, chunk=4)
  engine.start()
  while not engine.is_warm:
    time.sleep(0.02)
  with Live(engine, LIMITS) as live:
    yield live
  assert engine.close(seconds=60)


@pytest.mark.slow
def test_odd_requests_compile_nothing(warm, compiled):
  answers = list(odd_requests(warm))
  assert len(answers) > 12
  assert [answer.text for answer in answers if answer.status_code != 200] == []
  assert compiled() == []


def test_the_usual_buckets_are_known_after_a_failure(idle):
  request = request_lib.unconditional(idle.pipeline.layout.vocab, 16)
  usual = [bucket_of(request, SamplingConfig(), idle.pipeline.generator)]
  idle._generator.usual = usual
  idle._fail_running()
  assert idle._generator.usual == usual
