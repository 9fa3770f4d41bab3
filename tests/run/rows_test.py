import dataclasses
import json
import pathlib

from etils import epath
import numpy as np
import pytest

from cm3leon_jax.config.settings import default_config, settings_from_config
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.run.run import Run
from cm3leon_jax.stages import stages
from tests.data.stores import VOCAB, make_sources
from tests.refusals import refused
from tests.retrieval.stores import write_neighbors


def settings_with(**train_fields):
  config = default_config()
  config.vocab.update(dataclasses.asdict(VOCAB))
  config.model.update(
    {"vocab_size": VOCAB.size, "width": 32, "num_heads": 4, "mlp_width": 64, "max_positions": 128}
  )
  config.data.update({"sequence_length": 128, "pack_window": 64, "text_share": 0.3})
  config.train.update({"global_batch_size": 4, **train_fields})
  return settings_from_config(config)


@pytest.fixture
def workdir(tmp_path):
  """Makes document stores of both splits and their neighbors, as stages before training would."""
  sources = make_sources(tmp_path / "made")
  documents, neighbors = tmp_path / "documents", tmp_path / "neighbors"
  documents.mkdir()
  neighbors.mkdir()
  for split in ("train", "heldout"):
    for kind in ("pairs", "texts"):
      (documents / f"{split}_{kind}").symlink_to(tmp_path / "made" / kind)
    ids = sources[0].neighbors
    write_neighbors(neighbors / f"{split}_pairs", ids=ids, text_ids=ids)
  for folder in (documents, neighbors):
    (folder / stages.DONE).write_text(json.dumps({"id": folder.name, "config": {}, "summary": {}}))
  return epath.Path(tmp_path)


def test_rows_of_both_splits_hold_pairs_and_texts(workdir):
  settings = settings_with()
  for split, has_spans in (("train", True), ("heldout", False)):
    rows = [Run(workdir, settings).rows(split)[i] for i in range(30)]
    targets = np.concatenate([row["targets"] for row in rows])
    assert VOCAB.is_image(targets).any()
    assert bool((targets == VOCAB.eoss).any()) == has_spans


def test_rows_of_both_splits_are_aligned_as_the_decoder(workdir):
  for align_images in (False, True):
    settings = settings_with()
    model = dataclasses.replace(settings.model, family="modern", align_images=align_images)
    settings = dataclasses.replace(settings, model=model)
    for split in ("train", "heldout"):
      rows = Run(workdir, settings).rows(split)
      assert any((rows[i]["positions"] < 0).any() for i in range(10)) == align_images


def test_interleaved_documents_get_their_share(workdir):
  documents = pathlib.Path(workdir) / "documents"
  (documents / "train_interleaved").symlink_to(documents / "train_pairs")
  settings = settings_with()

  def mixed(**shares):
    return dataclasses.replace(settings, data=dataclasses.replace(settings.data, **shares))

  settings = mixed(text_share=0.2, interleaved_share=0.5)
  plan = Run(workdir, settings).rows("train").plan
  filled = np.zeros(3)
  for i in range(200):
    for placement in plan.row(i):
      filled[placement.source] += placement.num_positions
  np.testing.assert_allclose(filled / filled.sum(), [0.3, 0.2, 0.5], atol=0.02)
  with pytest.raises(ValueError, match=r"text_share is 0\.6 and interleaved_share is 0\.5"):
    mixed(text_share=0.6, interleaved_share=0.5)


def test_neighbors_of_other_documents_are_refused(workdir):
  write_neighbors(workdir / "neighbors" / "train_pairs", ids=np.zeros((3, 4), np.int32))
  with refused(UserError, "neighbors"):
    Run(workdir, settings_with()).rows("train")


@pytest.mark.parametrize("wrong", [-5, 50, 2**31 - 1])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_neighbors_outside_of_the_bank_are_refused(workdir, split, wrong):
  ids = np.zeros((50, 4), np.int32)
  ids[7, 1] = wrong
  write_neighbors(workdir / "neighbors" / f"{split}_pairs", ids=ids, text_ids=ids)
  with refused(UserError, "neighbors"):
    Run(workdir, settings_with()).rows(split)


def tuned_from(workdir, root, settings):
  """Makes a run whose base is `workdir`; both have the same documents."""
  run = epath.Path(root / "tuned")
  for name in ("documents", "neighbors"):
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (root / "tuned" / name).symlink_to(root / name)
  (workdir / "train").mkdir()
  write_json(workdir / "train" / "config.json", {"settings": dataclasses.asdict(settings)})
  (run / "text_tokenizer").mkdir()
  about = {"summary": {"copied_from": str(workdir)}}
  write_json(run / "text_tokenizer" / stages.DONE, about)
  return run


def with_base(settings, **fields):
  data = dataclasses.replace(settings.data, base_documents=9, **fields)
  return dataclasses.replace(settings, data=data)


def test_documents_of_the_base_get_their_share_in_training_and_half_of_the_heldout_rows(
  workdir, tmp_path
):
  base = settings_with()
  run = tuned_from(workdir, tmp_path, base)
  names = ("pairs", "texts", "base", "base_texts")
  for share, split, expected in ((0.2, "train", 0.2), (0.2, "heldout", 0.5), (0, "heldout", 0.5)):
    rows = Run(run, with_base(base, base_share=share)).rows(split)
    assert rows.source_names == names
    shares = [source.share for source in rows.plan.sources]
    own, of_parent = 1 - expected, expected
    np.testing.assert_allclose(shares, [0.7 * own, 0.3 * own, 0.7 * of_parent, 0.3 * of_parent])
  unused = Run(run, with_base(base)).rows("train")
  assert [source.name for source in unused.plan.sources] == ["pairs", "texts"]
  assert unused.source_names == ()
