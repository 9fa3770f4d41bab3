"""Tests the page in headless Chromium, with the bundled model that answers questions and edits."""

import base64
import io
import json
import re

import jax
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright
import pytest

from cm3leon_jax import CM3Leon
from cm3leon_jax.mesh import MeshConfig, create_mesh
from cm3leon_jax.serving.engine import Engine
from cm3leon_jax.serving.web.limits import Limits
from tests.serving.live import Live, image, png

CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
PROMPT = "a green bell to the left of a blue key"
SECONDS = 60_000  # Time limit of each action in playwright, in milliseconds.

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bundled():
  """Starts an engine with the bundled model; XLA optimizes its programs."""
  jax.config.update("jax_disable_most_optimizations", False)
  mesh = create_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
  model = CM3Leon.load("scenes-instruct", batch_size=8, mesh=mesh)
  engine = Engine(model.pipeline, model.mesh, slots=8, chunk=8)
  engine.start()
  assert engine.wait_until_ready()
  yield engine
  assert engine.close(60)
  jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def served(bundled):
  with Live(bundled, Limits(), "scenes-instruct") as live:
    yield live


@pytest.fixture(scope="module")
def browser():
  with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
    yield browser
    browser.close()


@pytest.fixture(params=["light", "dark", "narrow"])
def page(served, browser, request):
  """Opens the page; checks at the end that the browser console is empty."""
  width = 400 if request.param == "narrow" else 1100
  scheme = "dark" if request.param == "dark" else "light"
  context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
  page = context.new_page()
  messages = []
  page.on("console", lambda message: messages.append(message.text))
  page.on("pageerror", lambda error: messages.append(str(error)))
  page.on("request", lambda request: messages.append(request.url) if (
    not request.url.startswith((served.url, "data:", "blob:"))) else None)  # fmt: skip
  page.goto(served.url)
  expect(page.locator("#model")).to_have_text("scenes-instruct, 48 × 48 pixels")
  yield page
  refused = "the server responded with a status of 400"  # Chromium logs this itself.
  assert [message for message in messages if refused not in message] == []
  context.close()


def press_until(page: Page, selector: str, key: str = "Tab") -> None:
  """Presses a key until an element has the focus."""
  for _ in range(60):
    if page.evaluate("s => document.activeElement?.matches(s)", selector):
      return
    page.keyboard.press(key)
  raise AssertionError(f"{key} does not reach {selector}")


def done(page: Page, text: str) -> None:
  expect(page.locator("#status")).to_have_text(re.compile(text), timeout=SECONDS)
  expect(page.locator("#alert")).to_be_hidden()


def test_everything_works_by_the_keyboard_alone(page):
  press_until(page, "#prompt")
  page.keyboard.type(PROMPT)
  press_until(page, "#guidance")
  before = page.locator("#guidance-value").text_content()
  page.keyboard.press("ArrowRight")
  assert page.locator("#guidance-value").text_content() != before
  press_until(page, "#generate button")
  # Records what a screen reader announces, and the rows that are visible at that time.
  page.evaluate("""() => {
    window.rows = [];
    new MutationObserver(() => {
      const labels = document.querySelectorAll('#grid figcaption');
      for (const label of labels) window.rows.push(label.textContent);
    }).observe(document.getElementById('grid'), {subtree: true, childList: true});
  }""")
  page.keyboard.press("Enter")
  done(page, f"^Done: 4 images for “{PROMPT}”")
  seen = set(page.evaluate("window.rows"))
  assert {f"row {row} of 8" for row in (2, 4, 6)} <= seen
  assert page.locator("#grid img").count() == 4
  assert page.locator("#grid progress").count() == 0
  for i in range(4):
    alt = page.locator("#grid img").nth(i).get_attribute("alt")
    assert alt == f"Sample {i + 1} of 4: {PROMPT}"
  press_until(page, "#grid li:first-child button")
  page.keyboard.press("Enter")
  expect(page.locator("#with-image")).to_be_visible()
  press_until(page, "#caption button", "Shift+Tab")
  page.keyboard.press("Enter")
  done(page, "^Done: the caption is “.*(bell|key).*”\\.$")
  press_until(page, "#question")
  page.keyboard.type("What color is the bell?")
  page.keyboard.press("Enter")
  done(page, "^Done: the answer is “\\w+”\\.$")
  expect(page.locator("#images-title")).to_have_text(f"Images: {PROMPT}")
  press_until(page, "#instruction")
  page.keyboard.type("make the bell red")
  page.keyboard.press("Enter")
  done(page, "^Done: 1 image for “make the bell red”")
  press_until(page, "#left")
  for side in ("24", "0", "48", "24"):
    page.keyboard.press("Control+A")
    page.keyboard.type(side)
    page.keyboard.press("Tab")
  page.keyboard.type("a green bell to the left of a red star")
  page.keyboard.press("Enter")
  done(page, "^Done: 1 image for “a green bell to the left of a red star”")
  texts = page.locator("#text-list dt").all_text_contents()
  assert texts == ["What color is the bell?", "Caption:"]


def test_a_neighbor_is_shown_with_its_license_and_its_squares(page):
  page.fill("#prompt", "a blue pentagram")
  page.click("#generate button")
  done(page, "^Done: 4 images")
  expect(page.locator("#neighbor-list figcaption")).to_contain_text("pentagram")
  expect(page.locator("#neighbor-list figcaption")).to_contain_text("Apache-2.0")
  page.click("#neighbor-list button")
  marks = page.locator("#grid canvas")
  expect(marks).to_have_count(4)
  label = marks.first.get_attribute("aria-label")
  squares = int(re.fullmatch(r"(\d+) of 144 squares by this neighbor", label)[1])
  visible = marks.first.evaluate(
    "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter("
    "(value, i) => i % 4 === 3 && value >= 63).length"
  )
  assert 0 < squares <= visible + 1
  page.click("#neighbor-list button")
  expect(marks).to_have_count(0)


def test_a_box_is_dragged_on_an_image_of_the_user(page):
  page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": png(image(0))})
  canvas = page.locator("#given")
  expect(canvas).to_have_attribute("aria-label", "Your image: a.png")
  canvas.scroll_into_view_if_needed()
  bounds = canvas.bounding_box()
  x, y, side = bounds["x"], bounds["y"], bounds["width"]
  page.mouse.move(x + side / 2 + 1, y + side / 4 + 1)
  page.mouse.down()
  page.mouse.move(x + side - 2, y + side / 2 - 2, steps=4)
  page.mouse.up()
  sides = [int(page.input_value(f"#{name}")) for name in ("left", "top", "right", "bottom")]
  assert sides == [24, 12, 48, 24]
  page.click("#infill button")
  done(page, "^Done: 1 image for “box 24,12,48,24 filled in”")


def test_a_large_photo_is_scaled_before_it_is_sent(page):
  """The server refuses uploads of that many pixels."""
  file = {
    "name": "a.png",
    "mimeType": "image/png",
    "buffer": png(Image.new("L", (7_500, 6_000))),
  }
  page.set_input_files("#file", file)
  expect(page.locator("#given")).to_have_attribute("aria-label", "Your image: a.png")
  with page.expect_request("**/v1/chat/completions") as sent:
    page.click("#caption button")
  [part] = json.loads(sent.value.post_data)["messages"][0]["content"]
  data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
  assert Image.open(io.BytesIO(data)).size == (2048, 1639)
  done(page, "^Done: the caption is")


def test_a_refusal_is_shown_as_an_alert(page):
  page.fill("#prompt", "a <mask>")
  page.click("#generate button")
  expect(page.locator("#alert")).to_contain_text("which only task infill_text takes")


def test_stop_ends_the_request(page, served):
  page.fill("#samples", "8")
  page.fill("#prompt", PROMPT)
  # Clicks inside the page: the request could end between two clicks from this process.
  page.evaluate("""() => {
    document.querySelector('#generate button').click();
    setTimeout(() => document.getElementById('stop').click(), 30);
  }""")
  expect(page.locator("#status")).to_have_text("Stopped.")
  served.wait_for("requests_active", 0)


def test_a_token_is_asked_for(browser, bundled):
  with Live(bundled, Limits(token="correct-horse"), "locked") as locked:
    context = browser.new_context()
    page = context.new_page()
    page.goto(locked.url)
    expect(page.locator("#alert")).to_contain_text("the token is missing or wrong")
    page.fill("#token", "correct-horse")
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_contain_text("locked")
    expect(page.locator("#token-form")).to_be_hidden()
    page.fill("#prompt", PROMPT)
    page.click("#generate button")
    done(page, "^Done: 4 images")
    context.close()
