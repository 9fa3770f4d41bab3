"""Breaks requests in many ways: each is answered with 4xx that names the field, and never 5xx."""

import dataclasses
import io
import socket
import struct
import zlib

from PIL import Image
import pytest

from cm3leon_jax.serving import schemas
from cm3leon_jax.serving.errors import ApiError
from tests.serving.conftest import LIMITS
from tests.serving.live import Live, about, error, image, png

IMAGE = image(0)
MESSAGES = [{"role": "user", "content": about(IMAGE)}]
JSON_BODIES = {
  "/v1/images/generations": (schemas.Generation, {"prompt": "a", "seed": 1, "retrieve": 0}),
  "/v1/chat/completions": (
    schemas.Chat,
    {"messages": MESSAGES, "seed": 1, "max_tokens": 2, "retrieve": 0},
  ),
}
WRONG = [-1, 10**60, 1.5, "x", True, [], {}, 1e-30, ["x"], {"x": 1}, [MESSAGES]]


def param(cls, values, strict=True) -> str | None:
  """Returns the field that the refusal of a body names; None if the body is right."""
  try:
    schemas.read(cls, values, strict)
  except ApiError as error:
    return error.param and error.param.partition(".")[0]
  return None


def check(answer, field):
  """Expects that an answer names `field`, in the message and in `param`."""
  found = answer.json()["error"]
  assert answer.status_code == 400, found
  assert found["param"].partition(".")[0] == field, found
  assert "\n" not in found["message"]
  assert len(found["message"]) < 500


@pytest.mark.parametrize("path", JSON_BODIES)
def test_each_field_of_a_body_is_named_if_its_value_is_wrong(live, path):
  cls, valid = JSON_BODIES[path]
  assert live.http.post(path, json=valid).status_code == 200
  for field in (*cls.model_fields, "guidence"):
    broken = [{**valid, field: value} for value in WRONG]
    broken += [{k: v for k, v in valid.items() if k != field}]
    refused = [body for body in broken if param(cls, body) is not None]
    assert {param(cls, body) for body in refused} == {field}
    check(live.http.post(path, json=refused[0]), field)


def test_each_field_of_a_form_is_named_if_its_value_is_wrong(live):
  assert live.edit(png(IMAGE), prompt="a", seed="1").status_code == 200
  texts = ("prompt", "model", "size")  # Any text is right.
  for field in (*schemas.EditBody.model_fields, "guidence"):
    fields = {"prompt": "a", "seed": "1", field: "-"}
    if field not in texts:
      assert param(schemas.EditBody, fields, strict=False) == field
      check(live.edit(png(IMAGE), **fields), field)


# What no type can say: a wrong field, and the other fields of a request for an image.
GENERATIONS = [
  ("prompt", {"prompt": " "}),
  ("prompt", {"prompt": "car " * 200}),
  ("prompt", {"prompt": "a <mask>"}),
  ("n", {"prompt": "a", "n": 9}),
  ("size", {"prompt": "a", "size": "1024x1024"}),
  ("response_format", {"prompt": "a", "response_format": "url"}),
  ("temperature", {"prompt": "a", "temperature": 0}),
  ("retrieve", {"prompt": "a", "retrieve": 65}),
]


@pytest.mark.parametrize(("field", "body"), GENERATIONS)
def test_wrong_fields_of_generations(live, field, body):
  answer = live.generate(**body)
  status, found = error(answer)
  assert (status, answer.json()["error"]["param"]) == (400, field)
  assert error(live.generate(**{"stream": True, **body})) == (400, found)


BODIES = [
  (b"", "not valid JSON"),
  (b"[]", "must be an object"),
  (b'{"prompt": "a", "guidance": NaN}', "not valid JSON"),
  (b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", "not valid JSON"),
  (b'{"prompt": "a", "guidance": 1e999}', "guidance: "),
  (b"[" * 9_000, "recursion limit"),
  (b'{"prompt": ' + b"[" * 4_000 + b"]" * 4_000 + b"}", "not valid JSON"),
  (b"[" * 100_000, "at most 10,000 are allowed"),
  (b'{"prompt": "\\ud800"}', "not valid JSON"),
  ('{"prompt": "é"}'.encode("latin-1"), "not valid JSON"),
]


@pytest.mark.parametrize(("body", "fact"), BODIES)
def test_damaged_bodies(live, body, fact):
  headers = {"Content-Type": "application/json"}
  status, found = error(live.http.post("/v1/images/generations", content=body, headers=headers))
  assert status == 400
  assert fact in found
  assert "\n" not in found


def test_other_types_of_bodies_methods_and_paths(live):
  answer = live.http.post("/v1/images/generations", content=b'{"prompt": "a"}')
  assert error(answer) == (415, "the body must be JSON: send Content-Type: application/json.")
  assert error(live.http.post("/v1/images/edits", json={}))[0] == 415
  assert error(live.http.get("/v1/images/generations"))[0] == 405
  assert error(live.http.get("/v1/nothing"))[0] == 404
  headers = {"Content-Type": "multipart/form-data; boundary=x"}
  answer = live.http.post("/v1/images/edits", content=b"--x\r\nbroken", headers=headers)
  assert error(answer)[0] == 400


def bomb() -> bytes:
  """Returns a PNG file of a few bytes that claims a size of 20,000 x 20,000 pixels."""

  def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

  header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


def eps() -> bytes:
  """Returns an image that Pillow would start a program for."""
  buffer = io.BytesIO()
  Image.new("RGB", (8, 8)).save(buffer, "EPS")
  return buffer.getvalue()


FORMS = [
  ("image", 413, bomb(), {"prompt": "a"}),
  ("image", 413, png(image(0, (65, 64))), {"prompt": "a"}),
  ("image", 400, png(IMAGE)[:-40], {"prompt": "a"}),
  ("image", 400, eps(), {"prompt": "a"}),
  ("prompt", 400, png(IMAGE), {}),
  ("box", 400, png(IMAGE), {"box": "0,0,9,2"}),
  ("box", 400, png(IMAGE), {"box": "4,0,4,2"}),
  ("retrieve", 400, png(IMAGE), {"prompt": "a", "retrieve": "1"}),
  ("guidance", 400, png(IMAGE), {"prompt": "a", "guidance": "2"}),
  ("edit_guidance", 400, png(IMAGE), {"box": "0,0,2,2", "edit_guidance": "2"}),
  ("guidance", 400, png(IMAGE), {"box": "0,0,2,2", "guidance": "2"}),
]


def url(value: str) -> list[dict]:
  return [{"type": "image_url", "image_url": {"url": value}}]


CHATS = [
  url("http://169.254.169.254/a.png"),
  url("file:///etc/passwd"),
  url("data:text/html;base64,aaaa"),
  url("data:image/png;base64,!!!!"),
  url("data:image/png;base64,aaaa"),
  about(IMAGE) + about(IMAGE),
  "hello",
  [{"type": "audio"}],
  [{"type": "text", "words": "a"}],
]


@pytest.mark.parametrize("content", CHATS)
def test_wrong_chats(live, content):
  answer = live.chat(content)
  assert answer.status_code == 400
  assert answer.json()["error"]["param"].startswith(("messages", "image_url"))


CHAT_FIELDS = [
  ("", {"max_tokens": 107}, "max_tokens"),
  ("", {"max_completion_tokens": 2000, "max_tokens": 4}, "max_completion_tokens"),
  ("", {"temperature": 1e-30}, "temperature"),
  ("car " * 200, {"max_tokens": 4}, "prompt"),
]


EDITS, CHAT = "/v1/images/edits", "/v1/chat/completions"
TWO = [("image", ("a.png", png(IMAGE))), ("image[]", ("b.png", png(IMAGE)))]
OTHER_FILES = [("image", {"prompt": (None, "a")}), ("image", TWO), ("mask", {"mask": TWO[0][1]})]
USER = {"role": "user", "content": "a"}
REQUESTS = [
  *((*x[:2], EDITS, {"files": {"image": x[2]}, "data": x[3]}) for x in FORMS),
  *((field, 400, EDITS, {"files": files}) for field, files in OTHER_FILES),
  *((field, 400, CHAT, {"json": {"messages": [USER | {"content": about(IMAGE, text)}], **body}})
    for text, body, field in CHAT_FIELDS),
  *(("messages", 400, CHAT, {"json": {"messages": messages}})
    for messages in ([], [USER | {"role": "system"}], [USER] * 2)),
]  # fmt: skip


@pytest.mark.parametrize(("field", "status", "path", "sent"), REQUESTS)
def test_a_wrong_request_is_refused_with_its_field(live, field, status, path, sent):
  answer = live.http.post(path, **sent)
  assert (answer.status_code, answer.json()["error"]["param"]) == (status, field)


def test_a_body_that_is_too_large_is_not_read(live):
  status, found = error(live.generate(prompt="a" * LIMITS.most_bytes))
  assert (status, found) == (413, "the body is larger than 150,000 bytes: send a smaller image.")

  def pieces():
    for _ in range(400):
      yield b" " * 1000

  headers = {"Content-Type": "application/json"}
  answer = live.http.post("/v1/images/generations", content=pieces(), headers=headers)
  assert error(answer) == (413, found)


def raw(live, text: str) -> str:
  """Sends the text of an HTTP request; returns the first line of the response."""
  with socket.create_connection(("127.0.0.1", live.port), timeout=30) as opened:
    opened.sendall(text.replace("\n", "\r\n").encode())
    return opened.recv(4096).decode().splitlines()[0]


HOSTS = {200: ["localhost", "127.0.0.1:8000", "[::1]:8000", "LocalHost:8000"]}
HOSTS[403] = ["evil.example", "localhost.evil.example:8000", "127.0.0.1@evil.example", "[::1", ""]
HOSTS[403] += ["evil.example@localhost", "localhost#evil.example", "localhost/evil.example"]
HOSTS[403] += ["localhost?evil.example", "localhost:abc", "localhost:99999"]


def test_a_local_server_answers_to_names_of_this_machine_only(live):
  """Otherwise, a web page could point its host name to 127.0.0.1 and read responses."""
  for status, hosts in HOSTS.items():
    for host in hosts:
      line = raw(live, f"GET /v1/models HTTP/1.1\nHost: {host}\nConnection: close\n\n")
      assert line.split()[1] == str(status), host


def test_pages_of_other_origins_are_refused(live):
  other = live.url.replace("http", "evil", 1)
  for origin, status in (
    (live.url, 200),
    ("https://evil.example", 403),
    ("null", 403),
    (other, 403),
  ):
    body = {"prompt": "a", "seed": 0}
    answer = live.http.post("/v1/images/generations", json=body, headers={"Origin": origin})
    assert answer.status_code == status


def test_a_token_must_be_right(engine):
  with Live(engine, dataclasses.replace(LIMITS, token="correct-horse")) as locked:
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "correct-horse"}):
      for path in ("/v1/models", "/metrics"):
        answer = locked.http.get(path, headers=header)
        assert error(answer)[0] == 401
        assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/", "/app.js", "/healthz", "/readyz"):
      assert locked.http.get(path).status_code == 200
    right = {"Authorization": "Bearer correct-horse"}
    assert locked.http.get("/v1/models", headers=right).status_code == 200
    odd = {"Authorization": b"Bearer \xff\xfe"}
    assert locked.http.get("/v1/models", headers=odd).status_code == 401
