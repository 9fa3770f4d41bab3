from cm3leon_jax.commands import config_file
from cm3leon_jax.config import UserError
from cm3leon_jax.settings import default_config
from tests.launched import cm3leon
from tests.messages import refused


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
  for config, sentence in (
    ("ml_configs/scenes.py:soon", "config variant 'soon' of scenes.py must be a positive number"),
    ("ml_configs/nope.py:2", "--config=ml_configs/nope.py: there is no such file; name a "),
    ("ml_configs/scenes.py:2", "./raw is not finished: run `cm3leon prepare_data` with the same "),
  ):
    result = cm3leon("train_clip", f"--config={config}", "--workdir=.", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {sentence}".replace("./raw", "raw"))
