from unittest import mock

import pytest

from cm3leon_jax.serving.web import server
from cm3leon_jax.serving.web.limits import Limits


@pytest.mark.parametrize(("is_warm", "seconds"), [(True, 30), (False, 0)])
def test_a_server_that_stops_does_not_wait_for_its_compiler(monkeypatch, is_warm, seconds):
  for module, name in ((server, "Server"), (server, "configured"), (server.signal, "signal")):
    monkeypatch.setattr(module, name, mock.Mock())
  engine = mock.Mock(is_warm=is_warm, failure=None, queue_limit=1)
  with server.listen("127.0.0.1", 0) as opened:
    server.serve(engine, "tiny", Limits(), "127.0.0.1", opened, stop_seconds=30)
  engine.close.assert_called_once_with(seconds=seconds)
