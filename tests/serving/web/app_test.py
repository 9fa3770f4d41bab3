from concurrent import futures
import dataclasses

import numpy as np
import pytest

from cm3leon_jax.generation.image_tasks import InfillImage
from cm3leon_jax.generation.text_tasks import InfillText
from tests.serving.live import about, error, events, image, pixels, png

pytestmark = pytest.mark.filterwarnings("ignore:(this model|retrieve is) ")

IMAGE = image(0)
CAPTION = "a red apple"


def test_images_are_those_of_the_python_call(live, model):
  settings = {"guidance": 2.0, "top_p": 0.8, "top_k": 5, "temperature": 0.7}
  answer = live.generate(prompt=CAPTION, n=2, seed=5, retrieve=2, **settings)
  assert answer.status_code == 200, answer.text
  found = answer.json()
  expected = model.generate(CAPTION, num_samples=2, seed=5, retrieve=2, **settings)
  for data, sample in zip(found["data"], expected, strict=True):
    np.testing.assert_array_equal(pixels(data["b64_json"]), sample.image)
    assert (data["seed"], data["clip_score"]) == (sample.seed, pytest.approx(sample.clip_score))
  documents = model.retrieve(CAPTION, k=2)
  for shown, document in zip(found["neighbors"], documents, strict=True):
    for name in ("key", "caption", "source", "license", "attribution"):
      assert shown[name] == getattr(document, name)
    np.testing.assert_array_equal(pixels(shown["b64_json"]), document.image)
  [prompt] = {len(sample.tokens) for sample in expected}
  assert found["usage"]["output_tokens"] == 2 * prompt
  assert found["usage"]["input_tokens_details"]["image_tokens"] == 2 * 16
  other = live.generate(prompt=CAPTION, n=2, seed=6, retrieve=2, **settings).json()
  assert other["data"][0]["b64_json"] != found["data"][0]["b64_json"]


def test_explained_images_have_the_ratios_of_each_neighbor(live, model):
  body = {"prompt": CAPTION, "n": 2, "seed": 5, "retrieve": 2}
  whole = live.generate(**body, explain=True).json()["data"]
  streamed = events(live.generate(**body, explain=True, stream=True))
  for data, sample in zip(
    whole, model.generate(CAPTION, num_samples=2, seed=5, retrieve=2), strict=True
  ):
    expected = [one.ratios for one in sample.explain()]
    assert np.shape(data["ratios"]) == (2, 4, 4)
    np.testing.assert_allclose(data["ratios"], expected, atol=1e-3)
    [event] = [e for e in streamed if e.get("seed") == sample.seed]
    assert event["ratios"] == data["ratios"]
  assert "ratios" not in live.generate(**body).json()["data"][0]
  status, message = error(live.generate(**body | {"retrieve": 0}, explain=True))
  assert (status, "retrieved documents" in message) == (400, True)


@pytest.mark.parametrize(
  "method", ["top_p", "mixture", pytest.param("contrastive", marks=pytest.mark.slow)]
)
def test_a_sample_is_the_same_alone_in_a_batch_and_from_the_server(
  live, model, monkeypatch, method
):
  settings = model.pipeline.settings
  sampling = dataclasses.replace(settings.sampling, method=method)
  monkeypatch.setattr(model.pipeline, "settings", dataclasses.replace(settings, sampling=sampling))
  together = model.generate(CAPTION, num_samples=6, seed=5)
  used = {"top_p": {False}, "contrastive": {True}, "mixture": {False, True}}
  assert {sample.contrastive for sample in together} == used[method]
  served = live.generate(prompt=CAPTION, n=6, seed=5).json()["data"]
  for sample, data in zip(together, served, strict=True):
    [alone] = model.generate(CAPTION, seed=sample.seed)
    np.testing.assert_array_equal(alone.image, sample.image)
    np.testing.assert_array_equal(pixels(data["b64_json"]), sample.image)


def test_rows_stream_before_the_image(live):
  body = {"prompt": CAPTION, "seed": 5, "n": 2}
  whole = live.generate(**body).json()
  found = events(live.generate(**body, stream=True))
  for index in (0, 1):
    *partial, last = [event for event in found if event["index"] == index]
    assert [event["type"] for event in partial] == ["image_generation.partial_image"] * 3
    assert [event["partial_image_index"] for event in partial] == [0, 1, 2]
    assert [(event["rows"], event["of_rows"]) for event in partial] == [(1, 4), (2, 4), (3, 4)]
    for event in partial:
      shown = pixels(event["b64_json"])
      assert (shown[event["rows"] * 2 :] == 160).all()
      assert (shown[: event["rows"] * 2] != 160).any()
    assert last["type"] == "image_generation.completed"
    assert last["b64_json"] == whole["data"][index]["b64_json"]
    assert last["neighbors"] == whole["neighbors"] == partial[0]["neighbors"]
  one = events(live.generate(**body, stream=True, partial_images=1))
  assert sorted((event["index"], event.get("rows")) for event in one if "rows" in event) == [
    (0, 2),
    (1, 2),
  ]
  none = events(live.generate(**body, stream=True, partial_images=0))
  assert [event["type"] for event in none] == ["image_generation.completed"] * 2


def test_a_box_is_filled_in(live, model):
  box, other = (2, 2, 6, 6), (0, 4, 8, 8)
  for prompt in ("", CAPTION):
    found = live.edit(png(IMAGE), box="3,2,6,5", prompt=prompt, seed="3").json()
    expected = model.infill(IMAGE, box, prompt, seed=3)
    np.testing.assert_array_equal(pixels(found["data"][0]["b64_json"]), expected)
  found = live.edit(png(IMAGE), box=",".join(map(str, other)), prompt=prompt, seed="3").json()
  assert (pixels(found["data"][0]["b64_json"]) != np.asarray(expected)).any()


def test_a_box_fills_row_by_row_within_the_given_image(live, model):
  found = events(live.edit(png(IMAGE), box="2,0,8,8", seed="3", stream="true"))
  *partial, last = found
  assert [(event["type"], event["rows"]) for event in partial] == [
    ("image_edit.partial_image", rows) for rows in (1, 2, 3)
  ]
  assert last["type"] == "image_edit.completed"
  expected = model.infill(IMAGE, (2, 0, 8, 8), seed=3)
  np.testing.assert_array_equal(pixels(last["b64_json"]), expected)
  tokenizer = model.pipeline.image_tokenizer
  sampling = model.pipeline.settings.sampling
  task = InfillImage(image=IMAGE, box=(2, 0, 8, 8), seed=3, sampling=sampling)
  [[sample]] = model.sample([task])
  codes = tokenizer.encode(np.asarray(IMAGE)[None])
  assert codes[0, :4].tolist() != sample.codes[0][:4].tolist()
  for row, event in enumerate(partial):
    codes[0, 4 * row + 1 : 4 * row + 4] = sample.codes[0][4 * row + 1 : 4 * row + 4]
    np.testing.assert_array_equal(pixels(event["b64_json"]), tokenizer.decode(codes)[0])


def test_captions_and_answers_are_those_of_the_python_calls(live, model):
  found = live.chat(about(IMAGE), seed=4, max_tokens=8).json()
  assert found["choices"][0]["message"]["content"] == model.caption(IMAGE, length=8, seed=4)
  found = live.chat(about(IMAGE, "What is it?"), seed=4, max_completion_tokens=8, n=2).json()
  texts = [choice["message"]["content"] for choice in found["choices"]]
  assert texts[0] == model.answer(IMAGE, "What is it?", length=8, seed=4)
  assert found["usage"]["prompt_tokens"] > 16
  greedy, same = (
    live.chat(about(IMAGE), temperature=0, max_tokens=8, seed=seed).json()["choices"][0]
    for seed in (1, 2)
  )
  assert greedy["message"]["content"] == same["message"]["content"]
  assert greedy["finish_reason"] in ("stop", "length")


def test_a_text_streams_in_pieces_that_make_the_whole(live):
  body = {"seed": 4, "max_tokens": 12, "n": 2}
  whole = live.chat(about(IMAGE, "What is it?"), **body).json()
  stream = live.chat(
    about(IMAGE, "What is it?"), stream=True, stream_options={"include_usage": True}, **body
  )
  *chunks, usage = events(stream)
  assert stream.text.endswith("data: [DONE]\n\n")
  assert usage["usage"] == whole["usage"]
  for choice in whole["choices"]:
    own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
    assert own[0]["delta"]["role"] == "assistant"
    text = "".join(c["delta"].get("content", "") for c in own)
    assert text == choice["message"]["content"]
    assert len(own) > 4  # The text arrives in several chunks.
    assert own[-1]["finish_reason"] == choice["finish_reason"]


def test_masks_in_a_text_are_filled_in(live, model):
  text, body = "a <mask> apple on <mask>", {"seed": 2, "max_tokens": 4}
  [choice] = live.chat(text, **body).json()["choices"]
  sampling = model.pipeline.settings.sampling
  [[sample]] = model.sample([InfillText(text, length=4, seed=2, sampling=sampling)])
  assert choice["message"]["content"] == sample.text
  own = [chunk["choices"][0] for chunk in events(live.chat(text, stream=True, **body))]
  assert "".join(c["delta"].get("content", "") for c in own) == sample.text
  assert own[-1]["finish_reason"] == choice["finish_reason"]
  status, sentence = error(live.chat("tell me a joke"))
  assert (status, sentence[:24]) == (400, "the message has no image")


def test_many_mixed_requests_get_what_each_gets_alone(live, model):
  def image_of(seed):
    data = live.generate(prompt=f"apple {seed}", seed=seed, retrieve=seed % 3).json()["data"]
    return pixels(data[0]["b64_json"])

  def edit_of(seed):
    data = live.edit(png(image(seed)), prompt="make it new", seed=str(seed)).json()["data"]
    return pixels(data[0]["b64_json"])

  def caption_of(seed):
    return live.chat(about(image(seed)), seed=seed, max_tokens=8).json()["choices"][0]["message"]

  kinds = [image_of, edit_of, caption_of] * 8
  with futures.ThreadPoolExecutor(24) as pool:
    found = list(pool.map(lambda job: job[1](job[0]), enumerate(kinds)))
  for seed in (0, 9, 21):
    expected = model.generate(f"apple {seed}", seed=seed, retrieve=seed % 3)[0].image
    np.testing.assert_array_equal(found[seed], expected)
  np.testing.assert_array_equal(found[13], model.edit(image(13), "make it new", seed=13))
  assert found[23]["content"] == model.caption(image(23), length=8, seed=23)
  live.wait_for("requests_active", 0)


def test_health_readiness_and_metrics(live):
  for path in ("/health", "/healthz"):
    assert (live.http.get(path).status_code, live.http.get(path).text) == (200, "ok\n")
  assert live.http.get("/readyz").text == "ready\n"
  before = live.gauge("samples_total")
  live.generate(prompt=CAPTION, n=3, seed=0)
  live.generate(prompt="")
  assert live.gauge("samples_total") == before + 3
  text = live.http.get("/metrics")
  assert text.headers["content-type"].startswith("text/plain; version=0.0.4")
  for line in text.text.splitlines():
    assert line.startswith("# ") or len(line.rsplit(" ", 1)) == 2
  endpoint = '{endpoint="/v1/images/generations",status="400"}'
  assert f"cm3leon_serve_requests_total{endpoint} " in text.text
  assert "cm3leon_serve_ready 1" in text.text
