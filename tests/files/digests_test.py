from cm3leon_jax.files import digests


def test_digest_literal(tmp_path):
  (tmp_path / "a").write_bytes(b"abc")
  assert digests.digest(tmp_path / "a").startswith("ba7816bf8f01cfea")
  assert digests.digest(tmp_path / "b") is None
