"""Serves fake GCS buckets on localhost, with the parts of the JSON API that our libraries use.

The clients are gcsfs, TensorStore, google-cloud-storage and the C++ client of ArrayRecord. Tests
make the server answer slowly, with errors, or not at all.
"""

from collections.abc import Callable
import contextlib
import email
import email.policy
import functools
import http.server
import json
import re
import threading
from urllib.parse import parse_qs, unquote, urlsplit

OBJECT = re.compile(r"^(?:/download)?(?:/storage/v1)?/b/([^/]+)/o/(.+)$")


class Server:
  """Serves GCS buckets from memory. A bucket exists as long as it contains an object.

  Attributes:
    objects: stored objects, (bucket, name) -> (content, generation).
    requests: (method, path and query) of each request.
    fault: called with the method and the path before a request is answered. It may wait, or return
      the status code of the response.
  """

  def __init__(self):
    self.objects: dict[tuple[str, str], tuple[bytes, int]] = {}
    self.requests: list[tuple[str, str]] = []
    self.fault: Callable[[str, str], int | None] = lambda method, path: None
    self.uploads: dict[str, tuple[str, str, bytearray]] = {}
    self.lock = threading.Lock()
    self._generation = 0
    self._http = http.server.ThreadingHTTPServer(("localhost", 0), functools.partial(Handler, self))
    self.url = f"http://localhost:{self._http.server_address[1]}"
    threading.Thread(target=self._http.serve_forever, daemon=True).start()

  def close(self) -> None:
    self._http.shutdown()
    self._http.server_close()

  def environment(self) -> dict[str, str]:
    """Returns environment variables that direct a process's client libraries to this server."""
    return {
      "STORAGE_EMULATOR_HOST": self.url,
      # Otherwise gcsfs asks Google for the kind of bucket.
      "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
      "GOOGLE_CLOUD_PROJECT": "tests",
      "TENSORSTORE_GCS_HTTP_URL": self.url,
      "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
      "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.url,
      "NO_GCE_CHECK": "true",
    }

  def files(self, prefix: str) -> dict[str, bytes]:
    """Returns the objects below `prefix`, such as `bucket/folder/`, as name -> content."""
    return {
      f"{bucket}/{name}".removeprefix(prefix): content
      for (bucket, name), (content, _) in sorted(self.objects.items())
      if f"{bucket}/{name}".startswith(prefix)
    }

  def put(self, bucket: str, name: str, content: bytes, match: str | None) -> dict | None:
    with self.lock:
      _, generation = self.objects.get((bucket, name), (b"", 0))
      if match is not None and int(match) != generation:
        return None
      self._generation += 1
      self.objects[bucket, name] = (bytes(content), self._generation)
      return self.about(bucket, name)

  def has(self, bucket: str) -> bool:
    return any(b == bucket for b, _ in list(self.objects))

  def about(self, bucket: str, name: str) -> dict:
    content, generation = self.objects[bucket, name]
    return {
      "kind": "storage#object",
      "id": f"{bucket}/{name}/{generation}",
      "bucket": bucket,
      "name": name,
      "size": str(len(content)),
      "generation": str(generation),
      "metageneration": "1",
      "contentType": "application/octet-stream",
      "timeCreated": "2026-01-01T00:00:00.000Z",
      "updated": "2026-01-01T00:00:00.000Z",
    }

  def list(self, bucket: str, query: dict[str, str]) -> dict:
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    items, prefixes = [], set()
    for b, name in sorted(self.objects):
      inside = query.get("startOffset", "") <= name < query.get("endOffset", "\U0010ffff")
      if b != bucket or not name.startswith(prefix) or not inside:
        continue
      head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
      if found:
        prefixes.add(prefix + head + delimiter)
      else:
        items.append(self.about(bucket, name))
    return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}


class Handler(http.server.BaseHTTPRequestHandler):
  """Answers the requests of one connection from the buckets of a `Server`."""

  protocol_version = "HTTP/1.1"

  def __init__(self, buckets: Server, *connection):
    # Must be first, because `super().__init__` handles the whole connection.
    self.buckets = buckets
    super().__init__(*connection)

  def log_message(self, *_):
    pass

  def answer(self, status: int, content=b"", **headers) -> None:
    if isinstance(content, dict):
      content = json.dumps(content).encode()
      headers["Content-Type"] = "application/json"
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name.replace("_", "-"), value)
    self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(content)

  def refuse(self, status: int) -> None:
    self.answer(status, {"error": {"code": status, "message": f"status {status}"}})

  def body(self) -> bytes:
    if self.headers.get("Transfer-Encoding") != "chunked":
      return self.rfile.read(int(self.headers.get("Content-Length", 0)))
    parts = []
    while size := int(self.rfile.readline().split(b";")[0], 16):
      parts.append(self.rfile.read(size))
      self.rfile.readline()
    self.rfile.readline()
    return b"".join(parts)

  def handle_any(self) -> None:
    self.buckets.requests.append((self.command, self.path))
    body = self.body()
    if status := self.buckets.fault(self.command, self.path):
      self.refuse(status)
      return
    url, has = urlsplit(self.path), self.buckets.has
    query = {name: values[-1] for name, values in parse_qs(url.query).items()}
    if url.path.startswith("/upload/") or url.path.startswith("/resumable/upload/"):
      self.upload(unquote(url.path), query, body)
    elif found := OBJECT.match(url.path):
      self.object(found[1], found[2], query)
    elif (found := re.match(r"^/storage/v1/b/([^/]+)/o/?$", url.path)) and has(found[1]):
      self.answer(200, self.buckets.list(found[1], query))
    elif (found := re.match(r"^/storage/v1/b/([^/]+)$", url.path)) and has(found[1]):
      self.answer(200, {"kind": "storage#bucket", "id": found[1], "name": found[1]})
    # The C++ client of ArrayRecord uses this API.
    elif found := re.match(r"^/([^/]+)/(.+)$", url.path):
      self.object(found[1], found[2], {**query, "alt": "media"})
    else:
      self.refuse(404)

  do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

  def object(self, bucket: str, name: str, query: dict[str, str]) -> None:
    name, action, target = re.match(r"(.*?)(?:/(rewriteTo|copyTo|moveTo)/(.*))?$", name).groups()
    name = unquote(name)
    if (bucket, name) not in self.buckets.objects:
      self.refuse(404)
      return
    content, generation = self.buckets.objects[bucket, name]
    unless = query.get("ifGenerationNotMatch")
    if action:
      to = target.removeprefix("b/").partition("/")[0] if action != "moveTo" else bucket
      key = unquote(target.partition("o/")[2])
      about = self.buckets.put(to, key, content, query.get("ifGenerationMatch"))
      if action == "moveTo":
        del self.buckets.objects[bucket, name]
      self.answer(200, {"done": True, "resource": about, **about})
    elif self.command == "DELETE":
      with self.buckets.lock:
        self.buckets.objects.pop((bucket, name), None)
      self.answer(204)
    elif unless is not None and int(unless) == generation:
      self.answer(304)
    elif query.get("alt") == "media":
      self.read(content, generation)
    else:
      self.answer(200, self.buckets.about(bucket, name))

  def read(self, content: bytes, generation: int) -> None:
    about = {"x_goog_generation": str(generation), "x_goog_stored_content_length": len(content)}
    about["Content_Type"] = "application/octet-stream"
    found = re.match(r"bytes=(\d*)-(\d*)$", self.headers.get("Range", ""))
    if not found:
      self.answer(200, content, **about)
      return
    size = len(content)
    first = int(found[1]) if found[1] else max(0, size - int(found[2]))
    last = min(int(found[2]), size - 1) if found[1] and found[2] else size - 1
    if first >= size:
      self.answer(416, **about)
      return
    part = content[first : last + 1]
    self.answer(206, part, Content_Range=f"bytes {first}-{last}/{size}", **about)

  def upload(self, path: str, query: dict[str, str], body: bytes) -> None:
    bucket = re.search(r"/b/([^/]+)/o", path)[1]
    name, match = query.get("name"), query.get("ifGenerationMatch")
    if "upload_id" in query:
      self.continue_upload(query["upload_id"], body)
      return
    if query["uploadType"] == "resumable":
      name = name or json.loads(body)["name"]
      key = str(len(self.buckets.uploads))
      self.buckets.uploads[key] = (bucket, name, bytearray())
      self.answer(200, Location=f"{self.buckets.url}{path}?uploadType=resumable&upload_id={key}")
      return
    if query["uploadType"] == "multipart":
      about, body = self.parts(body)
      name = name or about["name"]
    stored = self.buckets.put(bucket, name, body, match)
    if stored is None:
      self.refuse(412)
    else:
      self.answer(200, stored)

  def parts(self, body: bytes) -> tuple[dict, bytes]:
    boundary = email.message_from_string(
      f"Content-Type: {self.headers['Content-Type']}\n\n", policy=email.policy.HTTP
    )["Content-Type"].params["boundary"]
    first, second = body.split(f"--{boundary}".encode())[1:3]
    blank = re.compile(rb"\r?\n\r?\n")
    content = blank.split(second, 1)[1]
    return json.loads(blank.split(first, 1)[1]), re.sub(rb"\r?\n$", b"", content)

  def continue_upload(self, key: str, body: bytes) -> None:
    bucket, name, content = self.buckets.uploads[key]
    content += body
    total = self.headers.get("Content-Range", f"bytes */{len(content)}").rpartition("/")[2]
    if total != "*" and int(total) == len(content):
      self.answer(200, self.buckets.put(bucket, name, bytes(content), None))
    else:
      self.answer(308, **({"Range": f"bytes=0-{len(content) - 1}"} if content else {}))

  def handle(self):
    with contextlib.suppress(ConnectionError):  # A client may disconnect.
      super().handle()


if __name__ == "__main__":
  running = Server()
  print(json.dumps(running.environment()), flush=True)
  threading.Event().wait()
