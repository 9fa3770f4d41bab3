import base64
import io

from etils import epath
import jax
import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.data.documents.store import Document, Segment
from cm3leon_jax.data.rows import loader
from cm3leon_jax.data.rows.sample_plan import SamplePlan
from cm3leon_jax.reports import inspect_page, row_contents, row_parts
from cm3leon_jax.tokenizers import text, vqgan
from cm3leon_jax.tokenizers.config import TextTokenizerConfig
from tests.data.stores import IMAGE_TOKENS, VOCAB, make_plan, make_sources
from tests.refusals import refused
from tests.reports.run_files import Page
from tests.tokenizers.tiny import tiny_config

VQGAN = tiny_config(downsample=2, stem=2)
CAPTION = "a red <b>cat</b> & dog"


@pytest.fixture(scope="module")
def text_tokenizer(tmp_path_factory):
  folder = tmp_path_factory.mktemp("text_tokenizer")
  # Has enough different words for a vocabulary of 512.
  words = [f"a red cat and dog word{i}" for i in range(300)] * 3
  text.train_text_tokenizer(words, VOCAB, TextTokenizerConfig(), folder)
  return text.TextTokenizer(folder, VOCAB)


@pytest.fixture(scope="module")
def image_tokenizer():
  return vqgan.ImageTokenizer(
    VQGAN, VOCAB.image_size, vqgan.init_params(VQGAN, VOCAB.image_size, jax.random.key(0))
  )


def pair(key, tokens, first_code=0):
  image = Segment(True, VOCAB.image_ids(first_code + np.arange(IMAGE_TOKENS)))
  return Document(
    key, (Segment(False, tokens), image), "http://source", "CC0-1.0", "A. Painter", group="<g>"
  )


def view_of(document, neighbors=(), spans=(), dropped=False, length=200):
  documents = [n.document for n in neighbors]
  tokens = len(loader.join([*documents, document], VOCAB)) + 3 * len(spans)
  size = min(4 + IMAGE_TOKENS if dropped else tokens, length + 1)
  plan = SamplePlan(tuple(range(len(neighbors))), dropped, spans, size)
  row = loader.pack_row(
    [loader.build_sample(document, documents, plan, VOCAB, 1.0)[:2]], length, VOCAB
  )
  (sample,) = row_parts.split_row(row, VOCAB)
  view = row_contents.view_sample(
    sample, row_contents.Origin(document, tuple(neighbors), 0), VOCAB, length
  )
  return row_contents.RowView(0, [view], row["loss_weights"])


@pytest.fixture(scope="module")
def blocks(text_tokenizer, image_tokenizer):
  def make(*args, **kwargs):
    row = view_of(*args, **kwargs)
    decoder = inspect_page.make_decoder([row], VOCAB, text_tokenizer, image_tokenizer)
    return inspect_page.sample_blocks(row.samples[0], decoder), row.samples[0], decoder

  return make


def read_png(uri):
  return np.asarray(
    Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))
  )


@pytest.mark.parametrize(
  ("words", "expected"),
  [
    ("a cat", [(False, "a cat")]),
    ("a cat \n", [(False, "a cat"), (True, "·"), (True, "↵\n")]),
    (" a  cat", [(True, "·"), (False, "a"), (True, "··"), (False, "cat")]),
    ("a\tb\u00a0c", [(False, "a"), (True, "⇥\t"), (False, "b"), (True, "⟨U+00A0⟩"), (False, "c")]),
    (
      "zero\u200bwidth\x00",
      [(False, "zero"), (True, "⟨U+200B⟩"), (False, "width"), (True, "⟨U+0000⟩")],
    ),
    ("", []),
  ],
)
def test_odd_white_space_is_marked(words, expected):
  assert inspect_page.mark_odd(words) == expected


def test_a_space_between_two_pieces_is_not_odd():
  assert inspect_page.mark_odd(" cat ", opens=False, closes=False) == [(False, " cat ")]
  assert inspect_page.mark_odd(" cat ", opens=False) == [(False, " cat"), (True, "·")]
  assert inspect_page.mark_odd("  cat", opens=False) == [(True, "··"), (False, "cat")]


def test_masked_codes_are_tinted_and_absent_ones_transparent():
  pixels = np.full((4, 4, 3), 100, np.uint8)
  painted = inspect_page.paint(
    pixels, np.array([-1, 0, 1, -1]), np.array([True, True, True, False])
  )
  assert painted.shape == (4, 4, 4)
  assert painted[::2, ::2].tolist() == [
    [[100, 100, 100, 255], [156, 78, 114, 255]],  # 0.4 * 100 + 0.6 * (194, 64, 124).
    [[113, 95, 165, 255], [100, 100, 100, 0]],
  ]
  np.testing.assert_array_equal(painted[:2, 2:], np.broadcast_to(painted[0, 2], (2, 2, 4)))


def test_a_sample_in_reading_order(blocks, text_tokenizer):
  neighbor = row_contents.NeighborView(pair("n", text_tokenizer.encode("a dog"), 16), 3, 4, 0.8125)
  found, _, _ = blocks(pair("d", text_tokenizer.encode("a cat")), [neighbor])
  assert [block.get("title", block.get("name")) for block in found] == [
    "</s>", "neighbor 1", "<break>", "the document", "</s>",
  ]  # fmt: skip
  assert found[1]["facts"] == [
    "n",
    "candidate 3 of 4, similarity 0.812",
    "CC0-1.0, A. Painter, http://source",
  ]
  assert found[3]["facts"] == ["d", "CC0-1.0, A. Painter, http://source"]
  words, brk, image = found[1]["items"]
  assert words["pieces"] == [{"runs": [(False, "a dog")], "span": -1, "name": ""}]
  assert brk == {"kind": "tag", "name": "<break>", "span": -1}
  assert (image["note"], image["masked"]) == ("16 codes", [])
  assert read_png(image["src"]).shape == (8, 8, 4)


def test_a_masked_text_is_marked_where_it_left_and_stands_at_the_end(blocks, text_tokenizer):
  ids = text_tokenizer.encode("a red cat")
  cut = next(i for i in range(1, len(ids)) if text_tokenizer.decode(ids[:i]) == "a red")
  found, _, _ = blocks(pair("d", ids), spans=((1 + cut, 1 + len(ids)),))
  assert found[1]["items"][0]["pieces"] == [
    {"runs": [(False, "a red")], "span": -1, "name": ""},
    {"runs": [(False, " cat")], "span": 0, "name": "<mask:0>"},
  ]
  assert (found[3]["title"], found[3]["span"]) == ("infill, from the document", 0)
  opening, words, end = found[3]["items"]
  assert (opening["name"], opening["span"]) == ("<mask:0>", 0)
  assert (end["name"], end["span"]) == ("<eoss>", 0)
  assert words["pieces"] == [{"runs": [(True, "·"), (False, "cat")], "span": 0, "name": "<mask:0>"}]
  assert words["note"] == f"{len(ids) - cut} token{'s' * (len(ids) - cut > 1)}"


def test_a_masked_image_is_tinted_where_it_left_and_has_only_its_codes_at_the_end(
  blocks, text_tokenizer, image_tokenizer
):
  ids = text_tokenizer.encode("cat")
  first = len(ids) + 2  # Skips </s>, the caption and <break>.
  found, _, _ = blocks(pair("d", ids), spans=((first + 2, first + 6), (first + 10, first + 11)))
  whole = image_tokenizer.decode(np.arange(IMAGE_TOKENS)[None])[0]
  image = found[1]["items"][-1]
  assert image["masked"] == [
    {"span": 0, "name": "<mask:0>", "codes": 4},
    {"span": 1, "name": "<mask:1>", "codes": 1},
  ]
  spans = np.repeat([-1, 0, -1, 1, -1], [2, 4, 4, 1, 5])
  np.testing.assert_array_equal(
    read_png(image["src"]), inspect_page.paint(whole, spans, np.ones(16, bool))
  )
  infill = found[3]["items"][1]
  assert infill["note"] == "4 of 16 codes"
  shown = read_png(infill["src"])
  kept = np.repeat([False, True, False], [2, 4, 10]).reshape(4, 4).repeat(2, 0).repeat(2, 1)
  np.testing.assert_array_equal(shown[..., 3], 255 * kept)
  np.testing.assert_array_equal(shown[kept][:, :3], whole[kept])


def test_remarks_name_dropped_conditioning_and_a_cut_end(blocks, text_tokenizer):
  found, view, decoder = blocks(pair("d", text_tokenizer.encode("cat")), dropped=True)
  assert [item.get("name") for item in found[1]["items"]] == ["<mask:0>", "<break>", None]
  assert "Conditioning dropped" in inspect_page.remarks(view, decoder)[0]
  ids = text_tokenizer.encode("cat")
  found, view, decoder = blocks(pair("d", ids), length=len(ids) + 2 + 9)
  assert inspect_page.remarks(view, decoder) == [
    "No neighbors.",
    "The row was full: the last 7 tokens were cut off.",
  ]
  image = found[1]["items"][-1]
  assert image["note"] == "10 of 16 codes"
  assert read_png(image["src"])[..., 3].sum() == 255 * 10 * 4
  assert found[-1]["kind"] == "box"  # The sample lacks its closing </s>.


def test_the_facts_of_a_sample(blocks, text_tokenizer):
  ids = text_tokenizer.encode("cat")
  _, view, decoder = blocks(pair("d", ids), dropped=True)
  assert inspect_page.sample_context(view, decoder)["facts"] == [
    ("segment id", "1"),
    ("positions in the row", "0 to 18"),
    ("positions in the sample", "0 to 18"),
    ("tokens", "20"),
    ("targets", "17 of weight 1, 2 of weight 0"),
    ("group", "<g>"),
    ("pass", "0"),
  ]


def test_an_image_with_too_many_codes_is_refused(text_tokenizer, image_tokenizer):
  row = view_of(Document("d", (Segment(True, VOCAB.image_ids(np.arange(17))),), "s", "l", "a"))
  with refused(UserError):
    inspect_page.make_decoder([row], VOCAB, text_tokenizer, image_tokenizer)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
  return make_plan(make_sources(tmp_path_factory.mktemp("stores")))


def test_the_page_is_one_file_with_every_image_inside(plan, text_tokenizer, image_tokenizer):
  scores = np.zeros(plan.sources[0].neighbors.shape, np.float32)
  row_loader = loader.RowLoader(plan, VOCAB)
  rows = [row_contents.read_row(row_loader, scores, number) for number in range(12)]
  decoder = inspect_page.make_decoder(rows, VOCAB, text_tokenizer, image_tokenizer)
  html = inspect_page.render(rows, plan, decoder, "ml_configs/scenes.py:2", "train")
  page = Page(html)
  page.check_whole()
  views = [view for row in rows for view in row.samples]
  at_their_place = sum(bool(s) and s[0].kind == "image" for view in views for s in view.segments)
  at_the_end = sum(part.moved and part.kind == "image" for view in views for part in view.parts)
  assert len(page.images) == at_their_place + at_the_end > 12
  assert all(view.origin.document.key in html for view in views)
  assert f"each of the {len(views)} samples" in html
  assert "Rows 0 to 11" in html


def test_quoted_text_is_escaped(plan, text_tokenizer, image_tokenizer):
  row = view_of(pair("<i>key</i>", text_tokenizer.encode(CAPTION)))
  decoder = inspect_page.make_decoder([row], VOCAB, text_tokenizer, image_tokenizer)
  html = inspect_page.render([row], plan, decoder, "<config>", "train")
  assert "a red &lt;b&gt;cat&lt;/b&gt; &amp; dog" in html
  assert "<b>cat" not in html
  assert "<i>key" not in html
  assert "&lt;config&gt;" in html
  assert "&lt;/s&gt;" in html


def test_the_page_shows_the_settings_of_its_rows(plan, text_tokenizer, image_tokenizer):
  text = Segment(False, np.arange(40, 139, dtype=np.int32))
  rows = [view_of(Document("t", (text,), "s", "l", "a"))]
  decoder = inspect_page.make_decoder(rows, VOCAB, text_tokenizer, image_tokenizer)
  html = inspect_page.render(rows, plan, decoder, "c.py", "train")
  for name, value in {
    "mixture": "70% pairs, 30% texts",
    "positions per row": "128",
    "neighbors per document": "at most 2, fixed",
    "CM3 spans per sample": "1 on average",
    "positions used in these rows": "50.0%",
    "samples with spans here": "0 of 1",
  }.items():
    assert f"<dt>{name}</dt><dd>{value}</dd>" in html


def test_check_writable_refuses_paths_that_cannot_be_written(tmp_path):
  folder = epath.Path(tmp_path)
  inspect_page.check_writable(folder / "new" / "rows.html")
  assert [path.name for path in (folder / "new").iterdir()] == []
  with refused(UserError):
    inspect_page.check_writable(folder)
  (folder / "file").write_text("")
  with refused(UserError):
    inspect_page.check_writable(folder / "file" / "rows.html")
