from cm3leon_jax.data.raw.ingest import CHECK_FROM, Rejections
from cm3leon_jax.errors import UserError
from tests.refusals import refused


def shard(right, **rejected):
  first = f"the first of {sum(rejected.values())}" if rejected else ""
  return {"counts": {"train_pairs": right}, "rejected": rejected, "first": first}


def test_the_share_is_that_of_all_shards(tmp_path):
  rejections = Rejections(0.1, tmp_path / "rejected.jsonl")
  rejections.add(shard(10))
  rejections.add(shard(7, missing_image=1, no_caption=1))
  rejections.add(shard(1))
  rejections.check()  # 2 of 20 records are rejected, which is allowed.
  rejections.add(shard(0, no_caption=2))
  with refused(UserError, "no_caption", "rejected.jsonl"):
    rejections.check()


def test_a_long_source_stops_at_the_shard_after_which_too_many_are_wrong(tmp_path):
  rejections = Rejections(0.5, tmp_path / "rejected.jsonl")
  # Not yet an error, because the share may become smaller.
  rejections.add(shard(0, no_caption=CHECK_FROM - 1))
  with refused(UserError, "no_caption", "rejected.jsonl"):
    rejections.add(shard(1))
