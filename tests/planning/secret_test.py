"""Tests that a container reads its key from Secret Manager; local servers replace Google's."""

import base64
import http.server
import json
import threading
import urllib.error

import pytest

from cm3leon_jax.planning import secret

NAME = "projects/p/secrets/wandb"


class Google(http.server.BaseHTTPRequestHandler):
  """Fakes the metadata server and Secret Manager."""

  def do_GET(self):
    payload = {"payload": {"data": base64.b64encode(b"key").decode()}}
    answers = {
      (f"/{secret.TOKEN}", "Metadata-Flavor", "Google"): {"access_token": "t"},
      (f"/v1/{NAME}/versions/latest:access", "Authorization", "Bearer t"): payload,
    }
    for (path, header, value), answer in answers.items():
      if self.path == path and self.headers[header] == value:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())
        return
    self.send_error(403)

  def log_message(self, *arguments):
    pass


@pytest.fixture
def address():
  with http.server.ThreadingHTTPServer(("localhost", 0), Google) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}"
    server.shutdown()


def test_a_secret_is_read_as_the_service_account_of_the_machine(address):
  assert secret.read(NAME, address, address) == "key"


def test_a_secret_that_may_not_be_read_is_reported_in_one_line(address, monkeypatch, capsys):
  with pytest.raises(urllib.error.HTTPError):
    secret.read("projects/p/secrets/other", address, address)
  monkeypatch.setattr("sys.argv", ["secret", "projects/p/secrets/other", address, address])
  with pytest.raises(SystemExit, match="1"):
    secret.main()
  out, err = capsys.readouterr()
  assert out == ""
  assert err.startswith("error: the secret projects/p/secrets/other cannot be read: HTTP Error 403")
  assert err.count("\n") == 1
