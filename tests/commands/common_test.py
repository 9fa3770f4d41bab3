import jax
import pytest

from cm3leon_jax.commands import common


@pytest.mark.parametrize(
  ("backend", "set_before", "expected"),
  [("tpu", None, "own"), ("cpu", None, None), ("tpu", "/a", "/a")],
)
def test_compiled_programs_are_kept_in_the_workdir_of_an_accelerator(
  tmp_path, monkeypatch, backend, set_before, expected
):
  before = jax.config.jax_compilation_cache_dir
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  try:
    jax.config.update("jax_compilation_cache_dir", set_before)
    common.keep_compiled(tmp_path)
    assert jax.config.jax_compilation_cache_dir == (
      str(tmp_path / "compilation_cache") if expected == "own" else expected
    )
  finally:
    jax.config.update("jax_compilation_cache_dir", before)
