from cm3leon_jax.commands import config_file
from cm3leon_jax.config import UserError
from cm3leon_jax.settings import default_config
from tests.launched import cm3leon
from tests.refusals import check_refused, refused


def test_the_names_of_the_fields_are_those_of_the_classes():
  assert sorted(config_file.field_names()) == config_file.config_fields(default_config())


def test_the_path_in_a_checkout_is_a_name_where_there_is_none(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert config_file.find("ml_configs/scenes.py") == config_file.find("scenes")
  for name in ("ml_configs/nope.py", "runs/ml_configs/scenes.py", "ml_configs/base.py"):
    with refused(UserError):
      config_file.find(name)
  (tmp_path / "ml_configs").mkdir()
  (tmp_path / "ml_configs" / "scenes.py").write_text("")
  assert not config_file.find("ml_configs/scenes.py").is_absolute()


def test_a_command_quotes_the_config_as_it_was_given(tmp_path):
  for name in ("scenes.py:soon", "nope.py:2", "scenes.py:2"):
    config = f"--config=ml_configs/{name}"
    check_refused(cm3leon("train_clip", config, "--workdir=.", cwd=tmp_path))
