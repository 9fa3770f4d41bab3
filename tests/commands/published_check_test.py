from etils import epath
import pytest

from cm3leon_jax.commands import config_file, import_vqgan, published_check, train_vqgan
from cm3leon_jax.config import UserError
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.runs import stages
from cm3leon_jax.settings import settings_from_config
from tests.clip.huggingface_files import END, write_checkpoint
from tests.launched import launch
from tests.refusals import check_refused, refused
from tests.tokenizers.published_random import save_random


def settings_of(**fields):
  config = config_file.load("published_350m")
  config.update_from_flattened_dict({name.replace("__", "."): x for name, x in fields.items()})
  return settings_from_config(config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Writes random models; returns the folders of the tokenizer, of CLIP, and of a run."""
  root = epath.Path(tmp_path_factory.mktemp("published"))
  tokenizer, clip = root / "amused", root / "clip"
  tokenizer.mkdir()
  clip.mkdir()
  save_random(tokenizer, 8_192)
  write_checkpoint(clip, "quick_gelu", END)
  import_vqgan.main(settings_of(), root / "run", str(tokenizer), None)
  return tokenizer, clip, root / "run"


def test_an_import_and_a_clip_are_accepted_and_nothing_is_trained(folders, capsys):
  _, clip, run = folders
  settings = settings_of(retrieval__clip=str(clip))
  published_check.check(settings, run)
  train_vqgan.main(settings, run)  # Training would fail here, because raw/ is missing.
  assert "nothing is trained" in capsys.readouterr().out


def test_a_tokenizer_that_is_not_imported_is_refused(folders, tmp_path):
  settings = settings_of(retrieval__clip=str(folders[1]))
  for check in (published_check.check, train_vqgan.main):
    with refused(UserError, "--source", "--config"):
      check(settings, epath.Path(tmp_path))
  published_check.check(settings, epath.Path(tmp_path), copied=True)


def test_another_grid_of_codes_is_refused(folders, tmp_path):
  tokenizer, clip, run = folders
  large = settings_of(retrieval__clip=str(clip), vqgan__resolution=512)
  with refused(UserError, "--workdir", "256"):
    published_check.check(large, run)
  with refused(UserError, "--family", "config.vqgan.resolution"):
    import_vqgan.main(settings_of(vqgan__resolution=128), tmp_path, str(tokenizer), None)


def test_another_family_than_that_of_the_config_is_refused(folders, tmp_path):
  with refused(UserError, "--family", "--config.vqgan.published"):
    import_vqgan.main(settings_of(), tmp_path, str(folders[0]), "chameleon")


def test_a_folder_that_is_no_clip_is_refused_until_the_neighbors_are_found(folders, tmp_path):
  tokenizer, _, run = folders
  for clip in (tokenizer, "nowhere"):
    with refused(UserError, "config.retrieval.clip", "clip"):
      published_check.check(settings_of(retrieval__clip=str(clip)), run)
  settings = settings_of(vqgan__published="", retrieval__clip="nowhere")
  (tmp_path / "neighbors").mkdir()
  write_json(tmp_path / "neighbors" / stages.DONE, {})
  published_check.check(settings, epath.Path(tmp_path))


def test_mistakes_of_a_run_are_one_sentence(folders, tmp_path):
  tokenizer, clip, run = folders
  flags = ["--config=published_350m", f"--workdir={run}", f"--config.retrieval.clip={clip}"]
  check_refused(launch("run", *flags[:2], cwd=tmp_path))
  check_refused(launch("run", flags[0], "--workdir=new", flags[2], cwd=tmp_path))
  no_tokenizer = launch("import_vqgan", flags[0], "--workdir=new", f"--source={clip}", cwd=tmp_path)
  check_refused(no_tokenizer)
  (tmp_path / "photos").mkdir()
  (tmp_path / "photos" / "0.png").write_bytes((tokenizer / "config.json").read_bytes())
  no_captions = [flags[0], "--workdir=other", "--config.raw.source=photos"]
  check_refused(launch("prepare_data", *no_captions, cwd=tmp_path))
