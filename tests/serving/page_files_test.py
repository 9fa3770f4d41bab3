"""Tests that the page never parses strings as HTML, so that untrusted texts are harmless."""

import importlib.resources
import re

import pytest

PAGE = importlib.resources.files("cm3leon_jax.serving") / "page"
SCRIPTS = ("app.js", "canvas.js")
# Functions that parse a string as HTML or as code.
PARSERS = re.compile(
  r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser|srcdoc"
  r"|setHTML|\beval\b|\bFunction\(|set(?:Timeout|Interval)\(\s*[\"'`]|javascript:|\.on[a-z]+\s*=(?!\s*\()"
  r"|setAttribute\(\s*[\"'`]on"
)
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>"


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_script_of_the_page_parses_a_string_as_html(name):
  text = (PAGE / name).read_text(encoding="utf-8")
  assert PARSERS.findall(text) == []
  assert "textContent" in text or name != "app.js"


def test_the_page_has_no_program_beside_its_own_files():
  text = (PAGE / "index.html").read_text(encoding="utf-8")
  scripts = re.findall(r"<script[^>]*>", text)
  assert scripts
  assert all(re.search(r' src="[\w./]+"', script) for script in scripts)
  assert re.findall(r"<[^>]*\son\w+\s*=", text) == []
  assert re.findall(r"\sstyle\s*=|<style|<base|<iframe|<object", text) == []


def test_only_files_of_the_page_are_served(live):
  assert live.http.get("/app.js").status_code == 200
  for path in ("/nothing", "/app.py", "/..%2fengine.py", "/page/index.html"):
    assert live.http.get(path).status_code == 404


def test_answers_with_hostile_texts_are_json_that_no_browser_takes_for_a_page(live):
  answers = [
    live.generate(prompt="a", **{HOSTILE: 1}),
    live.generate(prompt="a", model=HOSTILE),
    live.http.get(f"/{HOSTILE}"),
    live.chat("<i onerror=alert(1)><mask>", seed=1, max_tokens=4),
  ]
  assert [answer.status_code for answer in answers] == [400, 404, 404, 200]
  assert {answer.headers["content-type"] for answer in answers} == {"application/json"}
  for answer in answers:
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "script-src 'self'" in answer.headers["content-security-policy"]
