import contextlib
import copy
import dataclasses
import json
import logging
import socket
import threading
import time
from unittest import mock

import httpx
import jax
import numpy as np
import pytest

from cm3leon_jax.data.documents.store import write_documents
from cm3leon_jax.decoding.continuous.engine import ContinuousGenerator, StepFailed
from cm3leon_jax.decoding.continuous.slots import RunningBatch
from cm3leon_jax.generation.image_tasks import TextToImage
from cm3leon_jax.serving import jobs
from cm3leon_jax.serving.engine import Engine
from cm3leon_jax.serving.errors import ApiError
from cm3leon_jax.serving.jobs import Failed, Finished, Job, Progress
from tests.data.stores import VOCAB
from tests.refusals import refused
from tests.serving.conftest import LIMITS
from tests.serving.live import Live, error

BODY = {"prompt": "a red apple", "seed": 1, "retrieve": 0}


@pytest.fixture
def slow(engine, monkeypatch):
  """Makes each chunk of the engine's steps 0.3 s longer."""
  step = engine._generator.step

  def slowly():
    time.sleep(0.3)
    return step()

  monkeypatch.setattr(engine._generator, "step", slowly)


def send(live, body: dict, receive_buffer: int = 2**16) -> socket.socket:
  """Sends a request on a new connection, which the caller must close."""
  text = json.dumps(body)
  opened = socket.socket()
  opened.settimeout(60)
  opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
  opened.connect(("127.0.0.1", live.port))
  opened.sendall(
    f"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    f"Content-Length: {len(text)}\r\n\r\n{text}".encode()
  )
  return opened


def test_a_client_that_leaves_in_the_middle_of_a_stream_frees_its_slots(live, slow, engine):
  before = live.gauge("samples_total")
  opened = send(live, {**BODY, "n": 8, "stream": True})
  received = b""
  while b"partial_image" not in received:
    received += opened.recv(4096)
  assert live.gauge("requests_active") == 1
  assert live.gauge("samples_running") == engine.slots
  assert live.gauge("requests_waiting") == 1  # Not all samples of the job have a slot.
  opened.close()
  live.wait_for("requests_active", 0, seconds=5)
  assert live.gauge("samples_running") == 0
  assert live.gauge("samples_total") == before  # No sample was finished.
  assert live.generate(**BODY).status_code == 200


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="needs Linux")
def test_a_client_that_reads_nothing_loses_its_connection(engine, monkeypatch):
  step = engine._generator.step
  monkeypatch.setattr(engine._generator, "step", lambda: time.sleep(0.6) or step())
  with Live(engine, LIMITS, unread_seconds=1) as live:
    before = live.gauge("samples_total")
    live.opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # Linux uses its minimum.
    with contextlib.closing(send(live, {**BODY, "n": 8, "stream": True}, receive_buffer=1)):
      live.wait_for("requests_active", 1)
      live.wait_for("requests_active", 0)
    assert live.gauge("samples_total") < before + 8
    assert live.generate(**BODY).status_code == 200


def test_too_many_connections_are_refused(engine):
  with Live(engine, LIMITS, connections=2) as live, contextlib.ExitStack() as stack:
    idle = [
      stack.enter_context(contextlib.closing(socket.create_connection(("127.0.0.1", live.port))))
      for _ in range(2)
    ]
    assert httpx.get(f"{live.url}/healthz").status_code == 503
    idle[0].close()
    ends = time.monotonic() + 10
    while httpx.get(f"{live.url}/healthz").status_code != 200:
      assert time.monotonic() < ends


def test_a_request_that_takes_too_long_is_answered_and_dropped(live, slow, engine, run):
  with Live(engine, dataclasses.replace(LIMITS, seconds=0.4), secret=str(run)) as hasty:
    answer = hasty.generate(**BODY, n=8)
    assert error(answer) == (
      504,
      "the answer took more than 0.4 s: request fewer samples, or try later.",
    )
    hasty.wait_for("requests_active", 0, seconds=5)
    stream = hasty.generate(**BODY, n=8, stream=True)
    assert stream.status_code == 200
    *_, last = stream.text.strip().split("\n\n")
    assert last.startswith('event: error\ndata: {"error": {"message": "the answer took more')
    hasty.wait_for("samples_running", 0, seconds=5)


def test_a_failed_chunk_fails_its_requests_and_no_others(live, engine, monkeypatch, caplog):
  generator, step = engine._generator, engine._generator.step

  def broken():
    monkeypatch.setattr(generator, "step", step)
    tickets = list(engine._running)
    for ticket in tickets:
      generator.remove(ticket)
    raise StepFailed(tickets) from RuntimeError("out of memory at /a/path/of/the/server")

  monkeypatch.setattr(generator, "step", broken)
  with caplog.at_level(logging.ERROR):
    status, sentence = error(live.generate(**BODY))
  assert (status, sentence) == (
    500,
    "the server failed to answer this request; its log has the reason.",
  )
  assert "out of memory" in caplog.text
  assert live.generate(**BODY).status_code == 200


def job(task, count=1):
  """Returns (job, list of its events, threading event that is set at its end)."""
  events, ended = [], threading.Event()

  def deliver(event):
    events.append(event)
    over = sum(isinstance(e, Finished) for e in events) == count
    if over or isinstance(event, Failed):
      ended.set()

  return Job(task, count, deliver), events, ended


@pytest.mark.parametrize(
  ("broken", "method"), [(RunningBatch, "step"), (ContinuousGenerator, "warm")]
)
def test_a_program_that_fails_is_not_hidden(model, monkeypatch, caplog, broken, method):
  """Without the first programs the server does not start; without others, it is not warm."""
  engine = Engine(model.pipeline, model.mesh, slots=3, chunk=4)
  error = StepFailed([]) if method == "warm" else RuntimeError("broken")
  monkeypatch.setattr(broken, method, mock.Mock(side_effect=error))
  engine.start()
  assert engine.wait_until_ready() == (method == "warm")
  while engine._pause is not None and engine.failure is None:
    time.sleep(0.02)
  assert not engine.is_warm
  text = "could not be compiled" if method == "warm" else "the server cannot start"
  assert text in f"{caplog.text} {engine.failure}"
  assert engine.close(seconds=60)


def test_all_kinds_of_requests_are_tried_and_stored_before_the_server_is_ready(model, monkeypatch):
  """A request that follows at once does not wait for the compilation of other programs.

  The example of docs/serving.md for images retrieves nothing, and has two samples.
  """
  tried, opens, store, warm = [], jobs.open_jobs, mock.Mock(), mock.Mock()
  monkeypatch.setattr(ContinuousGenerator, "warm", warm)
  monkeypatch.setattr("cm3leon_jax.serving.engine.PAUSE", 60.0)
  engine = Engine(model.pipeline, model.mesh, slots=3, chunk=4, store=store)

  def open_jobs(pipeline, asked, *others):
    if not engine.is_ready:
      tried.extend((one.task.name, bool(one.task.retrieve), one.num_samples) for one in asked)
    return opens(pipeline, asked, *others)

  monkeypatch.setattr(jobs, "open_jobs", open_jobs)
  engine.start()
  assert engine.wait_until_ready()
  assert store.called
  request, _, ended = job(TextToImage("a red apple", retrieve=0))
  engine.submit(request)
  assert ended.wait(60)
  assert not warm.called
  assert engine.close(seconds=60)
  image = "text_to_image"
  assert tried[:3] == [(image, True, 1), (image, False, 1), (image, False, 2)]
  assert {name for name, *_ in tried[3:]} == {"caption", "question", "edit", "infill_image"}


def test_samples_of_jobs_take_turns(engine):
  """Four jobs of four samples fill all slots; the next free slot goes to the fifth job."""
  sampling = engine.pipeline.settings.sampling
  task = TextToImage("a red apple", retrieve=0, sampling=sampling)
  large = [job(dataclasses.replace(task, seed=seed), 4) for seed in range(4)]
  one, _, one_ended = job(task)
  still = []
  deliver = one.deliver

  def ends(event):
    deliver(event)
    if isinstance(event, Finished):
      still.append([ended.is_set() for _, _, ended in large])

  one.deliver = ends
  with engine._changed:  # All jobs arrive together.
    for asked, _, _ in large:
      engine.submit(asked)
    engine.submit(one)
  assert one_ended.wait(60)
  assert all(ended.wait(60) for _, _, ended in large)
  assert still == [[False] * 4]


def test_a_small_request_gets_the_first_slot_of_a_large_one(model, monkeypatch):
  """The two slots become free at different times. The second is not for the large request again."""
  engine = Engine(model.pipeline, model.mesh, slots=2, chunk=4)
  task = TextToImage("a red apple", retrieve=0, sampling=model.pipeline.settings.sampling)
  (first, *_), (large, *_), (small, _, ended) = job(task), job(task, 256), job(task)
  image, steps, deliver = model.pipeline.layout.image_tokens + 1, [], engine._deliver
  monkeypatch.setattr(engine, "_deliver", lambda x: steps.append(x[0].steps) or deliver(x))
  with jax.set_mesh(model.mesh):
    engine._prepare([first])
    for _ in range(2):
      engine._compute()
    engine._prepare([large])
    while engine.samples == 0:
      engine._compute()
    engine._compute()  # Both slots have samples of the large request.
    engine._prepare([small])
    steps.clear()
    while not ended.is_set():
      engine._compute()
  assert image < sum(steps) < 1.5 * image


def test_a_short_request_enters_a_batch_that_a_longer_one_has_just_begun(model):
  engine = Engine(model.pipeline, model.mesh, slots=2, chunk=4)
  task = TextToImage("a red apple", retrieve=0, sampling=model.pipeline.settings.sampling)
  long = dataclasses.replace(task, prompt=" ".join(["a red apple"] * 8))
  with jax.set_mesh(model.mesh):
    engine._prepare([job(one)[0] for one in (task, task, task, long)])
    asked = [(one.request, one.job.task.sampling) for one in engine._open]
    short, *_, longer = [engine._generator.bucket(*one) for one in asked]
    engine._fill()
  assert short != longer
  assert short.fits(longer)
  assert (len(engine._running), len(engine._open)) == (4, 0)


def test_the_first_rows_of_a_streamed_image_arrive_after_the_next_chunk(model):
  engine = Engine(model.pipeline, model.mesh, slots=2, chunk=4)
  task = TextToImage("a red apple", retrieve=0, sampling=model.pipeline.settings.sampling)
  (other, *_), (streamed, events, _) = job(task), job(task)
  streamed.shows_progress = True
  with jax.set_mesh(model.mesh):
    for asked in (other, streamed):
      engine._prepare([asked])
      engine._compute()
  assert [event.rows for event in events if isinstance(event, Progress)] == [1]


def test_documents_that_were_retrieved_before_are_not_decoded_again(model, monkeypatch):
  monkeypatch.setattr(jobs, "KNOWN", 2)
  known, decoded = {}, []

  def opened(prompt, count):
    asked, *_ = job(TextToImage(prompt, retrieve=count))

    def decode(codes):
      decoded.append(len(codes))
      return model.pipeline.image_tokenizer.decode(np.stack(codes)) if codes else ()

    with jax.set_mesh(model.mesh):
      [(_, started)] = jobs.open_jobs(model.pipeline, [asked], decode, known)
    return started.neighbors

  first, again = opened("red apple", 2), opened("red apple", 2)
  assert [one.document.key for one in first] == [one.document.key for one in again]
  assert first[0].image is again[0].image
  assert decoded == [2, 0]
  opened("old house", 2)
  assert len(known) == 2


def test_a_job_that_fails_among_others_fails_alone(engine, monkeypatch, caplog):
  sampling = engine.pipeline.settings.sampling
  task = TextToImage("a red apple", retrieve=0, sampling=sampling)
  together, finish = [], engine._finish

  def broken(over):
    together.append(len(over))
    if any(opened.job is unlucky for opened, _, _ in over):
      raise RuntimeError("broken")
    finish(over)

  monkeypatch.setattr(engine, "_finish", broken)
  long = dataclasses.replace(task, prompt="apple " * 999)
  lucky, lucky_events, lucky_ended = job(task)
  unlucky, unlucky_events, unlucky_ended = job(task)
  wrong, wrong_events, wrong_ended = job(long)
  with engine._changed:  # All jobs arrive together.
    for one in (unlucky, wrong, lucky):
      engine.submit(one)
  assert lucky_ended.wait(60)
  assert unlucky_ended.wait(60)
  assert wrong_ended.wait(60)
  assert together == [2, 1, 1]
  assert isinstance(lucky_events[-1], Finished)
  assert unlucky_events[-1].error.status == 500
  assert [event.error.status for event in wrong_events] == [400]
  assert "broken" in caplog.text


def test_an_engine_that_closes_answers_what_waits(idle):
  sampling = idle.pipeline.settings.sampling
  waiting, events, ended = job(TextToImage("a", retrieve=0, sampling=sampling))
  idle.submit(waiting)
  idle._closing = True
  idle._run()
  assert ended.is_set()
  assert events[0].error.status == 503
  with refused(ApiError, status=503, param=None, code="stopping"):
    idle.submit(waiting)


def test_a_refusal_names_no_folder_of_the_server(model, tmp_path):
  write_documents(tmp_path / "documents" / "train_pairs", (), VOCAB)
  pipeline = copy.copy(model.pipeline)
  pipeline.bank = tmp_path
  pipeline.__dict__.pop("documents", None)  # Removes the cached documents of the other bank.
  asked, events, ended = job(TextToImage("a", retrieve=1))
  Engine(pipeline, model.mesh)._prepare([asked])
  assert ended.is_set()
  assert events[0].error.message == (
    "retrieve is 1, but the bank/documents/train_pairs has no documents: set retrieve to 0."
  )


def test_tasks_that_are_too_long_for_the_model_are_not_compiled(model):
  """An edit has two images. Rows that are shorter must not keep a server from its other tasks."""
  short, layout = copy.copy(model.pipeline), model.pipeline.layout
  short.layout = dataclasses.replace(layout, positions=2 * layout.image_tokens)
  names = [{task.name for task in jobs.usual_tasks(one)} for one in (model.pipeline, short)]
  assert "edit" in names[0] - names[1]
  assert "text_to_image" in names[1]
