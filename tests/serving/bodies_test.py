"""Large and odd bodies: refused in a sentence, before they take memory or time."""

import json
import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from cm3leon_jax.serving import schemas
from cm3leon_jax.serving.errors import ApiError

MIB = 2**20


def repeated(item: str, between: str, size: int) -> str:
  """Repeats an item until the text has about `size` bytes."""
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


def long_text(item, size):
  return json.dumps({"prompt": repeated(item, "", size)}, ensure_ascii=False)


def escaped(item, size):
  return json.dumps({"prompt": repeated(item, "", size // 6)})


def digits(item, size):
  return f'{{"seed": {"7" * size}}}'


SHAPES = [wide, content, keys, different_keys, deep, long_text, escaped, digits]
ITEMS = ["0", "null", '""', "{}", "[]", '"a"', "1e9", "a", "é", "語", "😀", "\\ud83d", "<mask>"]


@settings(max_examples=60)
@given(
  st.sampled_from(SHAPES), st.sampled_from(ITEMS), st.integers(0, 4 * MIB), st.booleans(),
  st.sampled_from([schemas.Generation, schemas.Chat]),
)  # fmt: skip
def test_any_body_is_read_or_refused_within_four_times_its_size(shape, item, size, mixed, cls):
  body = shape(item, size).encode(errors="replace")
  if mixed:  # One wide character makes a whole string of Python wide.
    body = body.replace(b"a", "😀".encode(), 1)
  refused = None
  tracemalloc.start()
  try:
    schemas.read(cls, schemas.read_json(body))
  except ApiError as error:
    refused = error
  grown = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert refused is None or (refused.status in (400, 413) and len(str(refused)) < 500)
  assert grown <= 4 * len(body) + 8 * MIB


@pytest.mark.parametrize("make", [wide, content])
def test_a_few_elements_are_named_and_many_are_counted(make):
  with pytest.raises(ApiError, match=r"messages.*0 is 0; it must be an object|content.*0 is 0"):
    schemas.read(schemas.Chat, schemas.read_json(make("0", 8).encode()))
  with pytest.raises(ApiError, match=r"at most 64"):
    schemas.read(schemas.Chat, schemas.read_json(make("{}", 1_000).encode()))
  with pytest.raises(ApiError, match=r"brackets, braces and commas; it may have 10,000\.$"):
    schemas.read_json(make("0", MIB).encode())


def test_an_image_with_a_short_text_is_no_large_body():
  """The limits are of values and of wide characters: 12 MiB of base64 have neither."""
  part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 12 * MIB}}
  message = {"role": "user", "content": [part, {"type": "text", "text": "Was ist das? 語"}]}
  body = json.dumps({"messages": [message]}, ensure_ascii=False).encode()
  assert schemas.read(schemas.Chat, schemas.read_json(body)).messages[0].content[0].image_url
  wide_body = body.replace("語".encode(), "😀".encode())
  with pytest.raises(ApiError, match="with characters of four bytes"):
    schemas.read_json(wide_body)
