import dataclasses
import io
import json
import socket
import struct
import zlib

from PIL import Image
import pytest

from tests.refusals import check_sentence
from tests.serving.conftest import LIMITS
from tests.serving.live import Live, about, error, image, png

IMAGE = image(0)
GENERATIONS = [
  {},
  {"prompt": None},
  {"prompt": " "},
  {"prompt": 5},
  {"prompt": "a", "guidence": 2},
  {"prompt": "a", "n": 0},
  {"prompt": "a", "n": 9},
  {"prompt": "a", "n": "2"},
  {"prompt": "a", "n": 1.5},
  {"prompt": "a", "n": True},
  {"prompt": "a", "stream": 1},
  {"prompt": "a", "top_p": "x"},
  {"prompt": "a", "n": 10**60},
  {"prompt": "a", "seed": -1},
  {"prompt": "a", "size": "1024x1024"},
  {"prompt": "a", "response_format": "url"},
  {"prompt": "a", "output_format": "webp"},
  {"prompt": "a", "background": "transparent"},
  {"prompt": "a", "temperature": 0},
  {"prompt": "a", "temperature": 1e-30},
  {"prompt": "a", "top_p": 1.5},
  {"prompt": "a", "guidance_schedule": "x"},
  {"prompt": "a", "retrieve": 65},
  {"prompt": "a", "retrieve": 10**6},
  {"prompt": "car " * 200},
  {"prompt": "a <mask>"},
]


@pytest.mark.parametrize("body", GENERATIONS)
def test_wrong_fields_of_generations(live, body):
  answer = live.generate(**body)
  status, found = error(answer)
  assert status == 400
  check_sentence(found)
  [field] = [name for name in (*body, "prompt") if name in found][:1]
  assert answer.json()["error"]["param"] == field
  assert error(live.generate(**{"stream": True, **body})) == (400, found)


def test_fields_without_a_meaning_here_are_taken(live):
  body = {"prompt": "a", "user": "u", "quality": "hd", "style": "vivid", "moderation": "low"}
  assert live.generate(**body, seed=1).status_code == 200


BODIES = [
  (b"", "the body is not valid JSON"),
  (b"{", "the body is not valid JSON"),
  (b"[]", "the body is a JSON list; it must be an object."),
  (b'{"prompt": "a", "guidance": NaN}', "the body is not valid JSON ('expected value at line 1 c"),
  (b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", "the body is not valid JSON"),
  (b'{"prompt": "a", "guidance": 1e999}', "guidance is inf; it must"),
  (b"[" * 9_000, "the body is not valid JSON ('recursion limit exceeded"),
  (b'{"prompt": ' + b"[" * 4_000 + b"]" * 4_000 + b"}", "the body is not valid JSON"),
  (b"[" * 100_000, "the body has 100,000 brackets, braces and commas; at most 10,000 are allowed."),
  (b'{"prompt": "\\ud800"}', "the body is not valid JSON"),
  ('{"prompt": "é"}'.encode("latin-1"), "the body is not valid JSON"),
]


@pytest.mark.parametrize(("body", "sentence"), BODIES)
def test_damaged_bodies(live, body, sentence):
  headers = {"Content-Type": "application/json"}
  answer = live.http.post("/v1/images/generations", content=body, headers=headers)
  status, found = error(answer)
  assert (status, found[: len(sentence)]) == (400, sentence)
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


TRUNCATED = png(IMAGE)[:-40]
FORMS = [
  ((bomb(), None, {"prompt": "a"}), 413),
  ((png(image(0, (65, 64))), None, {"prompt": "a"}), 413),
  ((TRUNCATED, None, {"prompt": "a"}), 400),
  ((b"%!PS-Adobe", None, {"prompt": "a"}), 400),
  ((png(IMAGE), None, {}), 400),
  ((png(IMAGE), None, {"box": "0,0,9,2"}), 400),
  ((png(IMAGE), None, {"box": "-1,0,2,2"}), 400),
  ((png(IMAGE), None, {"box": "4,0,4,2"}), 400),
  ((png(IMAGE), None, {"box": "1,2,3"}), 400),
  ((png(IMAGE), None, {"box": "abc"}), 400),
  ((png(IMAGE), png(IMAGE), {}), 400),
  ((png(IMAGE), bomb(), {}), 413),
  ((png(IMAGE), png(image(1, (4, 4))), {}), 400),
  ((png(IMAGE), png(IMAGE), {"box": "0,0,2,2"}), 400),
  ((png(IMAGE), None, {"prompt": "a", "retrieve": "1"}), 400),
  ((png(IMAGE), None, {"prompt": "a", "guidance": "2"}), 400),
  ((png(IMAGE), None, {"box": "0,0,2,2", "edit_guidance": "2"}), 400),
  ((png(IMAGE), None, {"box": "0,0,2,2", "guidance": "2"}), 400),
  ((png(IMAGE), None, {"prompt": "a <mask>"}), 400),
  ((png(IMAGE), None, {"prompt": "a", "n": "x"}), 400),
  ((png(IMAGE), None, {"prompt": "a", "stream": "x"}), 400),
]


@pytest.mark.parametrize(("form", "status"), FORMS)
def test_wrong_forms_of_edits(live, form, status):
  data, mask, fields = form
  answer = live.edit(data, mask, **fields)
  found, sentence = error(answer)
  assert found == status
  check_sentence(sentence)
  param = answer.json()["error"]["param"]
  assert param == ("retrieve" if "retrieves" in sentence else sentence.split()[0])


def test_a_form_without_an_image_or_with_other_files(live):
  answer = live.http.post("/v1/images/edits", files={"prompt": (None, "a")})
  assert error(answer) == (400, "image is required: send a file.")
  files = [("image", ("a.png", png(IMAGE))), ("image[]", ("b.png", png(IMAGE)))]
  answer = live.http.post("/v1/images/edits", files=files)
  assert error(answer) == (400, "image is given twice; this model takes only one.")
  answer = live.http.post("/v1/images/edits", files={"script": ("a.png", png(IMAGE))})
  assert error(answer)[1].startswith("there is no file 'script' here")
  assert answer.json()["error"]["param"] == "script"


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
  [5],
  5,
  about(IMAGE, "What? <break> x"),
]


@pytest.mark.parametrize("content", CHATS)
def test_wrong_chats(live, content):
  answer = live.chat(content)
  status, sentence = error(answer)
  assert status == 400
  check_sentence(sentence)
  param = answer.json()["error"]["param"]
  assert param.startswith("image_url" if sentence.startswith("image_url") else "messages")


CHAT_FIELDS = [
  ("", {"max_tokens": 0}, "max_tokens"),
  ("", {"max_tokens": 107}, "max_tokens"),
  ("", {"max_completion_tokens": 2000, "max_tokens": 4}, "max_completion_tokens"),
  ("", {"temperature": 1e-30}, "temperature"),
  ("car " * 200, {"max_tokens": 4}, "messages"),
]


@pytest.mark.parametrize(("text", "body", "field"), CHAT_FIELDS)
def test_wrong_fields_of_chats(live, text, body, field):
  answer = live.chat(about(IMAGE, text), **body)
  status, sentence = error(answer)
  assert (status, answer.json()["error"]["param"]) == (400, field)
  check_sentence(sentence)


def test_a_chat_has_one_message_of_a_user(live):
  for messages in (
    [],
    [{"role": "system", "content": "a"}],
    [{"role": "user", "content": "a"}] * 2,
  ):
    status, found = error(live.http.post("/v1/chat/completions", json={"messages": messages}))
    assert (status, found[:14]) == (400, f"messages has {len(messages)}"[:14])
  status, found = error(live.chat(about(IMAGE), tools=[]))
  assert (status, found[:29]) == (400, "there is no field 'tools' her")


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


@pytest.mark.parametrize(
  ("host", "status"),
  [
    ("localhost", 200),
    ("127.0.0.1:8000", 200),
    ("[::1]:8000", 200),
    ("evil.example", 403),
    ("localhost.evil.example:8000", 403),
    ("127.0.0.1@evil.example", 403),
    ("evil.example@localhost", 403),
    ("[::1", 403),
    ("", 403),
    ("localhost#evil.example", 403),
    ("localhost/evil.example", 403),
    ("localhost?evil.example", 403),
    ("localhost:abc", 403),
    ("localhost:99999", 403),
    ("LocalHost:8000", 200),
  ],
)
def test_a_local_server_answers_to_names_of_this_machine_only(live, host, status):
  """Otherwise, a web page could point its host name to 127.0.0.1 and read responses."""
  line = raw(live, f"GET /v1/models HTTP/1.1\nHost: {host}\nConnection: close\n\n")
  assert line.split()[1] == str(status)


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


def test_no_image_is_opened_that_pillow_would_start_a_program_for(live):
  eps = Image.new("RGB", (8, 8))

  buffer = io.BytesIO()
  eps.save(buffer, "EPS")
  status, found = error(live.edit(buffer.getvalue(), prompt="a"))
  assert (status, found[:21]) == (400, "image cannot be read;")


def test_errors_are_json_of_one_shape(live):
  body = live.generate(prompt="a", n=0).json()
  message = {"message": "n is 0; it must be at least 1.", "type": "invalid_request_error"}
  about = {"param": "n", "code": "invalid_value"}
  assert json.dumps(body) == json.dumps({"error": {**message, **about}})
