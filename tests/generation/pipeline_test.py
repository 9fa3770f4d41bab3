"""From captions and pictures to requests: whose captions, which neighbors, and what is refused before anything is compiled."""

import dataclasses

from etils import epath
import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.data.documents import DocumentStore, group_id, write_documents
from cm3leon_jax.decoding import jobs, tasks
from cm3leon_jax.decoding.asks import Ask
from cm3leon_jax.retrieval import neighbors
from cm3leon_jax.retrieval.bank import Embeddings
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from tests.data.stores import VOCAB
from tests.generation.run import SETTINGS

COLUMNS = [(2, SETTINGS.sampling)]


def write_picture(path, width=8, height=8):
  pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
  Image.fromarray(pixels).save(path)
  return str(path)


def ready(form, workdir, asks, clip=None):
  given = jobs.check_asks(form, asks, workdir)
  return jobs.make_jobs(SETTINGS, form, workdir, asks, given, clip, workdir)


def test_heldout_captions_are_spread_and_know_their_neighbors(workdir, form):
  found = jobs.heldout_jobs(form, workdir, 3, seed=7, columns=COLUMNS)
  assert [j.ask.prompt for j in found] == ["red apple", "blue car", "new house"]
  assert [j.ask.seed for j in found] == [7, 8, 9]
  assert [j.key for j in found] == ["h0", "h2", "h4"]
  assert [int(j.given[0, 0, 0]) for j in found] == [0, 80, 160]
  ids = neighbors.load_neighbors(workdir / "neighbors", "heldout_pairs", text_only=True)
  bank = DocumentStore(workdir / "documents" / "train_pairs", VOCAB)
  assert [[d.key for d in j.neighbors] for j in found] == [
    [bank[int(i)].key for i in ids[row][:2]] for row in (0, 2, 4)
  ]
  every = jobs.heldout_jobs(form, workdir, 5, 7, COLUMNS)
  assert len(every[1].neighbors) == 1  # It has no second one.
  both = jobs.heldout_jobs(form, workdir, 2, 7, [(0, SETTINGS.sampling), *COLUMNS])
  assert [(j.ask.row, j.ask.retrieve, len(j.neighbors)) for j in both] == [
    (0, 0, 0),
    (1, 0, 0),
    (0, 2, 2),
    (1, 2, 2),
  ]
  with pytest.raises(UserError, match="--captions is 6; only 5 pairs are held out"):
    jobs.heldout_jobs(form, workdir, 6, 0, COLUMNS)


def test_a_prompt_gets_the_neighbors_that_clip_names(workdir, form, clip):
  with_two, none = ready(
    form, workdir, [Ask(prompt="green car", retrieve=2), Ask(prompt="green car")], clip
  )
  bank = Embeddings(workdir / "neighbors" / "train")
  scores = bank.documents[:] @ clip.embed_texts([form.encode("green car")])[0]
  assert bank.keys[:][np.argmax(scores)] == group_id(with_two.neighbors[0].key)
  assert (with_two.given, len(with_two.neighbors), none.neighbors) == (None, 2, ())
  first = [*with_two.neighbors[0].segments[0].tokens, VOCAB.brk]
  assert with_two.request.streams[0][1 : 1 + len(first)].tolist() == first


def test_the_unconditional_stream_may_keep_the_neighbors(workdir, form, clip):
  ask = Ask(prompt="green car", retrieve=1)
  dropped, kept = ready(form, workdir, [ask, dataclasses.replace(ask, keep_neighbors=True)], clip)
  np.testing.assert_array_equal(dropped.request.streams[0], kept.request.streams[0])
  before = len(kept.request.streams[0]) - len(form.encode("green car")) - 1
  np.testing.assert_array_equal(kept.request.streams[1][:before], kept.request.streams[0][:before])
  assert len(dropped.request.streams[1]) == 3


def test_a_given_picture_is_searched_for_by_itself(workdir, form, clip, tmp_path):
  picture = write_picture(tmp_path / "a.png")
  (job,) = ready(form, workdir, [Ask("caption", image=picture, retrieve=1, length=9)], clip)
  vector = clip.embed_images(job.given[None])[0]
  bank = Embeddings(workdir / "neighbors" / "train")
  assert bank.keys[:][np.argmax(bank.documents[:] @ vector)] == group_id(job.neighbors[0].key)


def test_the_model_gets_the_codes_of_a_given_picture(workdir, form, tmp_path):
  picture = write_picture(tmp_path / "a.png")
  (job,) = ready(form, workdir, [Ask("edit", "blue", picture)])
  codes = ImageTokenizer.load(workdir / "vqgan").encode(np.asarray(Image.open(picture))[None])[0]
  expected = tasks.make_request(form, job.ask, codes)
  np.testing.assert_array_equal(job.request.streams[0], expected.streams[0])


def test_a_picture_of_another_size_is_squared_and_scaled(workdir, form, tmp_path, capsys):
  wide, large = (
    write_picture(tmp_path / "wide.png", 30, 20),
    write_picture(tmp_path / "large.png", 16, 16),
  )
  given = jobs.check_asks(form, [Ask("caption", image=i, length=9) for i in (wide, large)], workdir)
  assert {pixels.shape for pixels in given.values()} == {(8, 8, 3)}
  lines = capsys.readouterr().out.splitlines()
  assert lines == [
    f"generate: the centered square of 20 of {wide}, 30 x 20 pixels, is scaled to 8 x 8.",
    f"generate: {large}, 16 x 16 pixels, is scaled to 8 x 8.",
  ]


def test_a_box_that_is_rounded_is_told(workdir, form, tmp_path, capsys):
  ask = Ask("infill_image", image=write_picture(tmp_path / "a.png"), box=(1, 2, 5, 6))
  jobs.check_asks(form, [ask], workdir)
  assert (
    capsys.readouterr().out
    == "generate: box 1,2,5,6 is rounded out to whole codes of 2 pixels: 0,2,6,6.\n"
  )
  jobs.check_asks(form, [dataclasses.replace(ask, box=(0, 2, 6, 6))], workdir)
  assert capsys.readouterr().out == ""


def test_pictures_that_cannot_be_read(workdir, form, tmp_path):
  (tmp_path / "a.png").write_text("no picture")
  for name in ("a.png", "b.png"):
    ask = Ask("caption", image=str(tmp_path / name), length=9, where="f, line 2")
    with pytest.raises(UserError, match=f"^f, line 2: image {tmp_path / name} cannot be read"):
      jobs.check_asks(form, [ask], workdir)


def test_nothing_to_retrieve(workdir, form, clip, tmp_path, monkeypatch):
  empty = epath.Path(tmp_path)
  write_documents(empty / "documents" / "train_pairs", [], VOCAB)
  ask = Ask(prompt="green car", retrieve=2, where="f, line 1")
  with pytest.raises(
    UserError,
    match=r"^f, line 1: retrieve is 2, and .*train_pairs holds no documents: say --retrieve=0",
  ):
    jobs.check_asks(form, [ask], empty)
  nothing = lambda self, queries: (np.full((len(queries), 4), -1, np.int32), None)
  monkeypatch.setattr(neighbors.Retriever, "retrieve", nothing)
  with pytest.raises(UserError, match=r"^f, line 1: no document was found for 'green car': "):
    ready(form, workdir, [ask], clip)
