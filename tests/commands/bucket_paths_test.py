import importlib.util
import types

import ml_collections
import pytest

from cm3leon_jax.commands import bucket_paths
from cm3leon_jax.config import UserError
from tests.refusals import refused


@pytest.fixture
def given(monkeypatch):
  def give(gcsfs, fields=None, **values):
    config = ml_collections.ConfigDict(fields) if fields else None
    read = types.SimpleNamespace(flag_values_dict=lambda: {"config": config, **values})
    monkeypatch.setattr(bucket_paths.flags, "FLAGS", read)
    find = {"gcsfs": object() if gcsfs else None}.get
    monkeypatch.setattr(importlib.util, "find_spec", find)

  return give


@pytest.mark.parametrize("gcsfs", [False, True])
@pytest.mark.parametrize(
  ("fields", "values"),
  [
    (None, {"workdir": "s3://b/w"}),
    ({"raw": {"source": "s3a://b"}}, {}),
    ({"data": {"names": ["a", "s3://b/w"]}}, {}),
  ],
)
def test_a_bucket_of_another_kind_is_refused(given, gcsfs, fields, values):
  given(gcsfs, fields, **values)
  with refused(UserError):
    bucket_paths.check()


def test_a_flag_in_a_bucket_needs_gcsfs_and_a_field_waits_for_its_stage(given):
  given(False, {"raw": {"source": "gs://b/raw"}}, workdir="/local", samples=3)
  bucket_paths.check()
  given(False, workdir="gs://b/w")
  with pytest.raises(
    UserError, match=r"^--workdir=gs://b/w is in a GCS bucket, which needs gcsfs: pip"
  ):
    bucket_paths.check()
  given(True, workdir="gs://b/w")
  bucket_paths.check()


def test_buckets_are_named_once_and_without_their_folders(given):
  given(True, {"raw": {"source": "gs://c/raw"}}, workdir="gs://b/w", out="gs://b/other")
  assert bucket_paths.where() == "gs://b, gs://c"
  given(True, workdir="/local")
  assert bucket_paths.where() == "a path in the data"
