"""Tests that OpenAI's client library works with the server."""

import io

import numpy as np
import openai
import pytest

from tests.serving.live import about, image, pixels, png

pytestmark = pytest.mark.filterwarnings("ignore:(this model|retrieve is) ")


@pytest.fixture(scope="module")
def client(live):
  with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0) as client:
    yield client


def test_generations(client, live):
  found = client.images.generate(
    model="tiny", prompt="a red apple", n=2, size="8x8", extra_body={"seed": 1, "guidance": 2.0}
  )
  expected = live.generate(prompt="a red apple", n=2, seed=1, guidance=2.0).json()["data"]
  assert [data.b64_json for data in found.data] == [data["b64_json"] for data in expected]
  assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens


def test_a_stream_of_images(client, live):
  stream = client.images.generate(
    model="tiny", prompt="a red apple", stream=True, partial_images=3, extra_body={"seed": 1}
  )
  *partial, last = list(stream)
  assert [event.type for event in partial] == ["image_generation.partial_image"] * 3
  assert isinstance(last, openai.types.ImageGenCompletedEvent)
  [expected] = live.generate(prompt="a red apple", seed=1).json()["data"]
  assert last.b64_json == expected["b64_json"]


def test_edits(client, model):
  file = io.BytesIO(png(image(2)))
  file.name = "a.png"
  found = client.images.edit(
    model="tiny", image=[file], prompt="make it blue", extra_body={"seed": 1}
  )
  expected = model.edit(image(2), "make it blue", seed=1)
  np.testing.assert_array_equal(pixels(found.data[0].b64_json), expected)
  file.seek(0)
  *_, last = client.images.edit(
    model="tiny", image=file, prompt="make it blue", stream=True, extra_body={"seed": 1}
  )
  assert isinstance(last, openai.types.ImageEditCompletedEvent)
  np.testing.assert_array_equal(pixels(last.b64_json), expected)


def test_chat(client, model):
  messages = [{"role": "user", "content": about(image(2), "What is it?")}]
  options = {"model": "tiny", "messages": messages, "seed": 1, "max_tokens": 8}
  expected = model.answer(image(2), "What is it?", length=8, seed=1)
  found = client.chat.completions.create(**options)
  assert found.choices[0].message.content == expected
  chunks = client.chat.completions.create(**options, stream=True)
  assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected


def test_models_and_errors(client):
  assert [m.id for m in client.models.list()] == ["tiny"]
  with pytest.raises(openai.NotFoundError, match="this server has only the model 'tiny'"):
    client.images.generate(model="gpt-image-2", prompt="a")
  with pytest.raises(openai.BadRequestError, match="response_format: Input should be 'b64_json'"):
    client.images.generate(model="tiny", prompt="a", response_format="url")
