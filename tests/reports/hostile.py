"""Defines hostile text, and checks that it can change neither a page nor a terminal."""

from html.parser import HTMLParser

CONTROLS = "\x1b[2J\x1b]0;title\x07\x9b31m\x00\r\u202e"
HOSTILE = (
  "</title></textarea></script></style></svg>--><script>alert(1)</script>"
  "<img src=x onerror=alert(1)>\"'><svg onload=alert(1)><a href='javascript:alert(1)'>{{ 7 * 7 }} "
  f"&lt;b&gt; {CONTROLS} red"
)


class Tags(HTMLParser):
  """Collects the tags and attributes of a page.

  Attributes:
    found: TAG for each tag, and TAG.ATTRIBUTE for each attribute.
    links: values of attributes that link to a page or file.
  """

  def __init__(self, html: str):
    super().__init__()
    self.found: set[str] = set()
    self.links: list[str] = []
    self.feed(html)

  def handle_starttag(self, tag, attrs):
    self.found |= {tag, *(f"{tag}.{name}" for name, _ in attrs)}
    self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]


def check(html: str, harmless: str) -> None:
  """Asserts that hostile texts add neither tags nor control characters to a page."""
  assert "&lt;script&gt;alert(1)" in html
  hostile = Tags(html)
  assert hostile.found <= Tags(harmless).found
  assert all(link.startswith(("data:image/png;base64,", "#")) for link in hostile.links)
  assert "{{ 7 * 7 }}" in html
  assert not set(CONTROLS) - set("[2J]0;title31m") & set(html)
