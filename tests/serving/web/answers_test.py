import asyncio
import threading
import types

import numpy as np
import pytest

from cm3leon_jax.data.documents.store import Document
from cm3leon_jax.generation.image_tasks import TextToImage
from cm3leon_jax.serving import jobs
from cm3leon_jax.serving.jobs import Finished, Neighbor, Progress, Started
from cm3leon_jax.serving.web import answers

IMAGE = np.zeros((4, 4, 3), np.uint8)
SAMPLE = types.SimpleNamespace(
  index=0, segments=(IMAGE,), seed=0, clip_score=None, tokens=np.zeros(4, np.int32)
)


async def events():
  yield Started((Neighbor(Document("a", (), "b", "MIT", "c"), "a", IMAGE),), 1, 0)
  yield Progress(0, 1, IMAGE)
  yield Finished(SAMPLE)


@pytest.mark.parametrize("streamed", [False, True])
def test_images_are_encoded_outside_of_the_event_loop(streamed, monkeypatch):
  """Encoding a large image would block the event loop for tens of milliseconds."""
  threads = []
  for module in (answers, jobs):
    monkeypatch.setattr(module, "png", lambda _: threads.append(threading.get_ident()) or "")
  answer = answers.ImageAnswer(TextToImage(prompt="a"), resolution=4, total_rows=2)

  async def take():
    if streamed:
      return [event async for event in answer.stream(events())]
    return await answer.whole(events())

  asyncio.run(take())
  # Images and neighbors are both encoded in other threads, each neighbor only once.
  assert len(threads) == (3 if streamed else 2)
  assert threading.get_ident() not in threads
