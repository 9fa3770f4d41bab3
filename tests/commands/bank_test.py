"""Tests that `cm3leon bank remove` writes the removed documents, or refuses in one sentence."""

import json

import pytest

from tests.launched import SLOW, launch
from tests.refusals import check_refused, check_sentence
from tests.retrieval.neighbors_test import bank_of
from tests.retrieval.stores import write_bank


@pytest.fixture
def workdir(tmp_path):
  bank, folder = bank_of(6), tmp_path / "run" / "neighbors"
  write_bank(folder / "train", bank.texts, bank.images, bank.groups, bank.keys)
  (folder / "done.json").write_text('{"id": "neighbors"}')
  return folder.parent


def remove(workdir, *keys):
  documents = [f"--document={key}" for key in keys]
  return launch("bank", "remove", f"--workdir={workdir}", *documents, imported=SLOW)


def test_removed_documents_add_up(workdir):
  for key, said in (
    ("k4", ("again: k4; with", " 1 documents.", "stay in raw", "before are not changed.")),
    ("k2", ("again: k4, k2; with", " 2 documents.")),
  ):
    result = remove(workdir, key)
    assert (result.returncode, result.stderr) == (0, "")
    check_sentence(result.stdout, *said)
  assert json.loads((workdir / "neighbors" / "removed.json").read_text()) == {"keys": ["k4", "k2"]}


def test_mistakes_are_one_sentence(workdir, tmp_path):
  check_refused(remove(workdir), "--document=KEY")
  check_refused(remove(workdir, "k1", "k9"), "'k9' is not in the bank")
  check_refused(remove(tmp_path / "none", "k1"), "none", "build_neighbors")
  check_refused(remove("scenes", "k1"), "scenes is a bundle", "export")
  assert not (workdir / "neighbors" / "removed.json").exists()
