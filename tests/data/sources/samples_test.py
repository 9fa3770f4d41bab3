import json
import pathlib

from hypothesis import given
from hypothesis import strategies as st
import pytest

from cm3leon_jax.data.sources import formats, samples
from cm3leon_jax.data.sources.records import RawPair, RawText
from cm3leon_jax.errors import UserError
from tests.data.raw.untrusted_test import encoded, reasons
from tests.data.sources.formats_test import jpeg, prepare, read, write_tar
from tests.refusals import refused

OF_JSON = '{"caption": "of json"}'


@pytest.fixture
def folder(tmp_path):
  return tmp_path / "in"


def write(folder: pathlib.Path, **files: str | bytes) -> None:
  """Writes files: write(folder, a_jpg=b"...") writes folder/a.jpg; "__" means "/"."""
  for name, content in files.items():
    path = folder / ".".join(name.replace("__", "/").rsplit("_", 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_by_stem():
  names = ["a/x.JPG", "a/x.txt", "a/y.txt", "a/z.png", "a/z.png.txt", "notes.md", "a.b/c"]
  assert samples.by_stem(names) == {
    "a/x": ["a/x.JPG", "a/x.txt"],
    "a/y": ["a/y.txt"],
    "a/z": ["a/z.png", "a/z.png.txt"],
  }


def test_names_of_folders_as_people_have_them(tmp_path, capsys):
  """Umlauts in both Unicode forms, two suffixes, brackets in a folder, captions without image."""
  folder = tmp_path / "Fotos [2025]"
  composed, decomposed = "K\u00e4se", "Ka\u0308se"
  write(folder, z_jpg=jpeg(1), readme_txt="About.", lost_txt="A caption.")
  write(folder, **{f"{composed}_jpg": jpeg(2), f"{decomposed}_txt": "cheese"})
  (folder / "z.jpg.txt").write_text("z")
  items = list(read(str(folder)))
  assert {item.caption for item in items if isinstance(item, RawPair)} == {"cheese", "z"}
  assert [item.key for item in items if isinstance(item, RawText)] == ["lost.txt", "readme.txt"]
  listed = [line for line in capsys.readouterr().out.splitlines() if "no image" in line]
  assert "lost.txt, readme.txt" in listed[0]
  assert "z.jpg.txt" not in listed[0]
  assert len(list(read(f"{tmp_path}/Fotos*/z.*"))) == 1


def test_images_with_captions_beside_them_are_pairs(folder, tmp_path):
  about = {"caption": "three", "url": "https://example.org/c", "license": "MIT", "width": 8}
  write(
    folder, a_jpg=jpeg(1), a_txt="\ufeffone\n", b_PNG=encoded("png"), b_caption="two",
    deep__er__c_webp=encoded("webp"), deep__er__c_json=json.dumps(about), D_JPEG=jpeg(4),
    D_TXT="four",
  )  # fmt: skip
  root = str(folder)
  assert list(read(root)) == [
    RawPair("D", f"{root}/D.JPEG", "four", root),
    RawPair("a", f"{root}/a.jpg", "one", root),
    RawPair("b", f"{root}/b.PNG", "two", root),
    RawPair("deep/er/c", f"{root}/deep/er/c.webp", "three", "https://example.org/c", "MIT"),
  ]
  assert [i.key for i in read(f"{root}/deep/**")] == ["er/c"]
  counts = prepare(tmp_path / "raw", source=root, heldout_fraction=0.0)
  assert (counts["train_pairs"], counts["train_texts"]) == (4, 0)


def test_a_folder_and_a_tar_make_equal_records(tmp_path):
  files = {
    "a.jpg": jpeg(1), "a.txt": b"one", "b.png": encoded("png"), "b.caption": b"two",
    "c.jpg": jpeg(3), "c.json": b'{"caption": "three", "license": "MIT"}', "d.jpg": jpeg(4),
    "e.jpg": jpeg(5), "e.txt": b" \n", "f.jpg": jpeg(6), "f.json": b"{", "g.jpg": jpeg(7),
    "g.txt": b"\xff", "h.jpg": jpeg(8), "h.json": b'{"caption": ["eight"]}',
    "i.gif": encoded("gif"), "i.jpg": jpeg(9), "i.txt": b"nine", "j.caption": b"ten",
    "k.jpg": jpeg(1), "k.txt": b"tags", "k.caption": b"a sentence",
  }  # fmt: skip
  for name, content in files.items():
    write(tmp_path / "folder", **{name.replace(".", "_"): content})
  write_tar(tmp_path / "a.tar", list(files.items()))
  of_folder, of_tar = list(read(tmp_path / "folder")), list(read(tmp_path / "a.tar"))
  expected = [
    "a", "b", "c", "missing_caption", "empty_caption", *["malformed_record"] * 3, "i",
    "missing_image", "k",
  ]  # fmt: skip
  assert reasons(of_folder) == reasons(of_tar) == expected
  for here, there in zip(of_folder, of_tar):
    assert here.key == there.key
    if isinstance(here, RawPair):
      assert (here.caption, here.license) == (there.caption, there.license)
      assert pathlib.Path(here.image).read_bytes() == there.image


def test_the_first_caption_that_is_not_blank_is_taken(folder):
  """The order is .txt, .caption, .json."""
  write(
    folder, a_jpg=jpeg(1), a_txt="of txt", a_caption="of caption", a_json=OF_JSON, b_jpg=jpeg(2),
    b_caption="of caption", b_json=OF_JSON, c_jpg=jpeg(3), c_txt="", c_json=OF_JSON,
  )  # fmt: skip
  assert [item.caption for item in read(folder)] == ["of txt", "of caption", "of json"]


def test_in_a_mixed_folder_pairs_are_pairs_and_texts_are_texts(folder, tmp_path):
  write(
    folder, a_jpg=jpeg(1), a_txt="one", sub__b_jpg=jpeg(2), sub__b_txt="two", essay_txt="Long.",
    sub__notes_jsonl='{"text": "A line."}\n{"text": "Another."}\n', readme_md="x", meta_json="{}",
  )  # fmt: skip
  write_tar(folder / "0.tar", [("c.jpg", jpeg(3)), ("c.txt", b"three")])
  assert reasons(read(folder)) == ["a", "sub/b", "essay.txt", "notes.jsonl/0", "notes.jsonl/1", "c"]
  write(folder, texts_jsonl='{"key": "t", "text": "Listed."}\n')
  (folder / "0.tar").unlink()
  (folder / "sub" / "notes.jsonl").unlink()
  assert reasons(read(folder)) == ["t", "a", "sub/b", "essay.txt"]
  counts = prepare(tmp_path / "raw", source=str(folder), heldout_fraction=0.0)
  assert (counts["train_pairs"], counts["train_texts"]) == (2, 2)
  kinds = [part.kind for part in formats.parts(str(folder))]
  assert kinds == ["folder", "sidecars", "text"]
  assert reasons(read(folder, "sidecars")) == ["a", "sub/b"]
  assert reasons(read(folder, "text"))[:2] == ["a.txt", "essay.txt"]


def test_a_list_rules_over_captions_beside_its_images(folder):
  rows = [{"file_name": "a.jpg", "text": "of the list"}, {"file_name": "b.jpg", "text": ""}]
  write(
    folder, a_jpg=jpeg(1), a_txt="beside", b_jpg=jpeg(2), b_txt="beside", c_jpg=jpeg(3),
    c_txt="beside", unnamed_jpg=jpeg(4), essay_txt="Long.", other_jsonl="{}\n",
    metadata_jsonl="".join(json.dumps(row) + "\n" for row in rows), in__d_jpg=jpeg(5),
    in__pairs_jsonl='{"key": "d", "image": "d.jpg", "caption": "inner"}\n', in__d_txt="beside",
  )  # fmt: skip
  items = list(read(folder))
  assert reasons(items) == ["a.jpg", "empty_caption", "c", "d", "essay.txt"]
  captions = [item.caption for item in items if isinstance(item, RawPair)]
  assert captions == ["of the list", "beside", "inner"]
  assert isinstance(items[-1], RawText)


def test_images_without_any_caption_are_refused_or_rejected(folder):
  write(folder, a_jpg=jpeg(1))
  with refused(UserError, "a.jpg"):
    formats.parts(str(folder))
  write(folder, b_txt="A text.")
  assert reasons(read(folder)) == ["missing_caption", "b.txt"]
  with refused(UserError, "no image"):
    formats.parts(str(folder / "b.txt"), "sidecars")


def test_links_out_of_the_folder_are_not_read(tmp_path):
  write(tmp_path, out__a_jpg=jpeg(1), out__secret_txt="secret", in__a_txt="one", in__b_jpg=jpeg(2))
  (tmp_path / "in" / "a.jpg").symlink_to(tmp_path / "out" / "a.jpg")
  (tmp_path / "in" / "b.txt").symlink_to(tmp_path / "out" / "secret.txt")
  items = list(read(tmp_path / "in"))
  assert reasons(items) == ["outside_image", "linked_file"]
  assert not any("secret" in str(item.message) for item in items)
  [part] = formats.parts(str(tmp_path / "in"))
  assert reasons(formats.read(part, allow_outside=True)) == ["a", "linked_file"]


def test_a_folder_of_links_is_not_read(tmp_path):
  write(tmp_path, out__a_jpg=jpeg(1), out__a_txt="one", out__pairs_jsonl="{}", in__b_jpg=jpeg(2))
  for name in ("a.jpg", "a.txt"):
    (tmp_path / "in" / name).symlink_to(tmp_path / "out" / name)
  (tmp_path / "in" / "pairs.jsonl").symlink_to(tmp_path / "out" / "pairs.jsonl")
  assert reasons(read(tmp_path / "in")) == ["linked_file", "missing_caption"]
  for name in ("a.jpg", "b.jpg", "pairs.jsonl"):
    (tmp_path / "in" / name).unlink()
  with refused(UserError, "links"):
    formats.parts(str(tmp_path / "in"))


@given(st.lists(st.integers(0, 10**6), unique=True, min_size=1, max_size=300), st.data())
def test_an_added_name_changes_its_own_group(numbers, data):
  names = sorted(f"image {n}" for n in numbers)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(samples, "GROUP", 8)
    groups = list(samples.grouped(names))
    added = data.draw(st.integers(0, 10**6).filter(lambda n: n not in numbers))
    more = list(samples.grouped(sorted([*names, f"image {added}"])))
  assert [name for group in groups for name in group] == names
  assert max(map(len, groups)) <= 32
  if max(map(len, groups + more)) < 32:  # Unless a group was cut at the maximum size.
    assert sum(group not in groups for group in more) in (1, 2)
