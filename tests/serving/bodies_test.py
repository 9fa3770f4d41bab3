import json
import tracemalloc

from hypothesis import example, given, settings
from hypothesis import strategies as st
import pytest

from cm3leon_jax.serving import schemas
from cm3leon_jax.serving.errors import ApiError
from tests.refusals import refused

MIB = 2**20
CLASSES = {"/v1/images/generations": schemas.Generation, "/v1/chat/completions": schemas.Chat}


def repeated(item: str, between: str, size: int) -> str:
  """Repeats an item, with `between`, until the text has about `size` bytes."""
  count = max(1, size // (len(item.encode()) + len(between.encode())))
  return between.join([item] * count)


def wide(item, size):
  return f'{{"messages": [{repeated(item, ",", size)}]}}'


def content(item, size):
  return f'{{"messages": [{{"role": "user", "content": [{repeated(item, ",", size)}]}}]}}'


def keys(item, size):
  return f"{{{repeated(f'{json.dumps(item)}: 0', ',', size)}}}"


def different_keys(item, size):
  count = max(1, size // (len(item.encode()) + 16))
  return "{" + ",".join(f"{json.dumps(f'{item}{i}')}: 0" for i in range(count)) + "}"


def deep(item, size):
  return '{"messages": ' + "[" * (size // 2) + "]" * (size // 2) + "}"


def deep_objects(item, size):
  return '{"prompt": ' + '{"a":' * (size // 6) + "0" + "}" * (size // 6) + "}"


def wide_and_deep(item, size):
  """Nests lists that have four lists each."""
  text = item
  while len(text) < size // 4:
    text = f"[{','.join([text] * 4)}]"
  return f'{{"messages": {text}}}'


def long_text(item, size):
  return json.dumps({"prompt": repeated(item, "", size)}, ensure_ascii=False)


def escaped(item, size):
  return json.dumps({"prompt": repeated(item, "", size // 6)})


def long_keys(item, size):
  return json.dumps({repeated(item, "", size // 2): repeated(item, "", size // 2)})


def digits(item, size):
  return f'{{"seed": {"7" * size}}}'


SHAPES = [wide, content, keys, different_keys, deep, deep_objects, wide_and_deep, long_text]
SHAPES += [escaped, long_keys, digits]
ITEMS = ["0", "null", '""', "{}", "[]", '"a"', "1e9", "a", "é", "語", "😀", "\\ud83d", "<mask>"]


def made(shape, item, size, mixed) -> bytes:
  body = shape(item, size).encode(errors="replace")
  if mixed:  # A single wide character makes a whole Python string wide.
    body = body.replace(b"a", "😀".encode(), 1)
  return body


def refusal(cls, body: bytes) -> ApiError | None:
  try:
    schemas.read(cls, schemas.read_json(body))
  except ApiError as error:
    return error
  return None


def traced(cls, body: bytes) -> tuple[ApiError | None, int]:
  """Returns the refusal of a body, and the peak of the memory that Python allocated, in bytes."""
  tracemalloc.start()
  error = refusal(cls, body)
  grown = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  return error, grown


def bodies(least: int, most: int):
  """Draws (shape, item, approximate size in bytes, whether to add a wide character)."""
  return st.tuples(
    st.sampled_from(SHAPES), st.sampled_from(ITEMS), st.integers(least, most), st.booleans()
  )


@example((long_keys, "a", 2_990_000, True), schemas.Generation)  # Its key must not be copied again.
@settings(max_examples=60)
@given(bodies(0, 4 * MIB), st.sampled_from([*CLASSES.values()]))
def test_any_body_is_read_or_refused_within_four_times_its_size(described, cls):
  body = made(*described)
  allowed = 4 * len(body) + 8 * MIB
  error, grown = traced(cls, body)
  assert error is None or (error.status in (400, 413) and len(str(error)) < 500)
  # What other threads of the process allocate counts too, so a high peak is measured again.
  assert grown <= allowed or traced(cls, body)[1] <= allowed


@pytest.mark.parametrize(
  ("make", "param"), [(wide, "messages.0"), (content, "messages.0.content.0")]
)
def test_a_few_elements_are_named_and_many_are_counted(make, param):
  with refused(ApiError, param, status=400, param=param):
    schemas.read(schemas.Chat, schemas.read_json(make("0", 8).encode()))
  with refused(ApiError, "at most 64", status=400, param=param[:-2], code="too_long"):
    schemas.read(schemas.Chat, schemas.read_json(make("{}", 1_000).encode()))
  with refused(ApiError, "10,000", status=400, param=None):
    schemas.read_json(make("0", MIB).encode())


def test_an_image_with_a_short_text_is_no_large_body():
  """Limits count JSON values and wide characters, of which 12 MiB of base64 have few."""
  part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 12 * MIB}}
  message = {"role": "user", "content": [part, {"type": "text", "text": "Was ist das? 語"}]}
  body = json.dumps({"messages": [message]}, ensure_ascii=False).encode()
  assert schemas.read(schemas.Chat, schemas.read_json(body)).messages[0].content[0].image_url
  wide_body = body.replace("語".encode(), "😀".encode())
  with refused(ApiError, "four bytes", status=413, param=None):
    schemas.read_json(wide_body)
