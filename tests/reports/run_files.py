"""Makes the files of a run that its report shows, and parses the page."""

from html.parser import HTMLParser
import json
import re

import numpy as np
from PIL import Image

from cm3leon_jax.stages import stages
from cm3leon_jax.training.watch.metrics import MetricsLog
from tests.data.raw_folder import write_raw


def interval(bits, half):
  groups = {"groups": 7, "effective_groups": 3.2}
  return {"bits": bits, "low": bits - half, "high": bits + half, **groups}


MODALITY = {
  "tokens": 1000,
  "unigram": 8.43,
  "true": interval(3.39, 0.2),
  "shuffled": interval(3.56, 0.2),
  "none": interval(3.7, 0.2),
  "true_over_unigram": 0.402,
  "true_minus_shuffled": interval(-0.17, 0.05),
  "true_minus_none": interval(-0.31, 0.06),
}
NUMBERS = {
  "raw": {"train_pairs": 6, "heldout_pairs": 3},
  "text_tokenizer": {"characters_per_token": 3.1},
  "vqgan": {"psnr_db": 19.5, "codebook_perplexity": 240.0},
  "documents": {"train": {"pairs": 6}},
  "clip": {"recall@1": 0.12, "recall@5": 0.3, "chance@1": 0.01, "chance@5": 0.05},
  "neighbors": {"recall@2": 0.97, "backend": "exact"},
  "train": {"steps": 60},
  "samples": {},
  "evaluation": {"documents": 3, "image": MODALITY, "text": MODALITY},
  "export": {"parameters": 123},
}


def make_image(path, hue, side=32):
  y, x = np.mgrid[:side, :side]
  disc = (x - side / 2) ** 2 + (y - side / 2) ** 2 < (side / 3) ** 2
  pixels = np.full((side, side, 3), 255, np.uint8)
  pixels[disc] = [int(127 + 127 * np.sin(hue + k)) for k in (0, 2, 4)]
  if path is not None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
  return pixels


def make_raw(workdir):
  about = {"source": "drawings", "license": "CC-BY-SA-4.0", "attribution": "A. Painter"}
  splits = ["train"] * 6 + ["heldout"] * 3
  pairs = [
    {"key": f"k{i}", "caption": f"disc <{i}> & more", "split": split, **about}
    for i, split in enumerate(splits)
  ]
  write_raw(workdir / "raw", pairs, [make_image(None, i) for i in range(9)])


def make_log(folder):
  log = MetricsLog(folder)
  for step in range(1, 61):
    if step == 31:
      log = MetricsLog(folder, 30)
    losses = {"loss": 3.0, "image_loss": 3.2, "text_loss": 2.0}
    losses = {name: value + 3 / step for name, value in losses.items()}
    rate = {} if step in (1, 31) else {"tokens_per_second": 500.0}
    log.write(step, {**losses, "weight": 1000.0, **rate})
    if step % 20 == 0:
      log.write(step, {f"heldout_{name}": value + 0.1 for name, value in losses.items()})


def make_samples(folder):
  rng, lines = np.random.default_rng(0), []
  for key in ("k6", "k7"):
    for guidance in (1.0, 3.0, 5.0):
      for retrieve in (0, 2):
        name = f"{key}_{guidance}_{retrieve}.png"
        make_image(folder / name, float(rng.uniform(0, 6)))
        line = {"key": key, "prompt": f"disc <{key[1]}> & more", "file": name}
        line |= {"guidance": guidance, "retrieve": retrieve}
        line["neighbors"] = [{"key": "k0"}, {"key": "k1"}] if retrieve else []
        line["clip_score"] = float(rng.normal(0.2 + guidance / 50, 0.05))
        lines.append(line)
  (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_run(workdir, only=tuple(NUMBERS)):
  """Writes a workdir with the results of the given stages (default: all)."""
  for folder in only:
    with stages.once(workdir / folder, {}) as numbers:
      numbers.update(NUMBERS[folder])
      if folder == "raw":
        make_raw(workdir)
      if folder == "vqgan":
        pixels = np.stack([make_image(None, i) for i in range(4)])
        arrays = {"originals": pixels, "reconstructions": pixels // 2 + 60}
        np.savez(workdir / "vqgan" / "reconstructions.npz", **arrays)
      if folder == "train":
        make_log(workdir / "train" / "metrics")
        for step in (20, 40, 60):
          make_image(workdir / "train" / "samples" / f"{step:06d}.png", step, side=96)
      if folder == "samples":
        make_samples(workdir / "samples")


class Page(HTMLParser):
  """Collects the links and images of a page; fails if tags are not closed."""

  VOID = ("meta", "img", "br", "path", "use", "rect")

  def __init__(self, html):
    super().__init__()
    self.html, self.references, self.images, self.open = html, [], [], []
    self.feed(html)

  def handle_starttag(self, tag, attributes):
    values = dict(attributes)
    self.references += [values[name] for name in ("src", "href", "xlink:href") if name in values]
    self.images += [values] if tag == "img" else []
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.references += [v for name, v in attributes if name in ("src", "href", "xlink:href")]

  def handle_endtag(self, tag):
    if tag not in self.VOID:
      assert self.open.pop() == tag

  def check_whole(self):
    """Asserts that the page is complete and links to no other file."""
    assert self.open == []
    assert all(x.startswith(("data:image/png;base64,", "#")) for x in self.references)
    assert "url(http" not in self.html
    assert "@import" not in self.html


def headings(html):
  return re.findall("<h2>(.*?)</h2>", html)
