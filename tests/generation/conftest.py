"""Makes one tiny run for the tests in this folder."""

from etils import epath
import pytest

from cm3leon_jax.clip import model as clip_lib
from cm3leon_jax.generation.tasks import PromptLayout
from cm3leon_jax.run.run import Run
from cm3leon_jax.tokenizers import text
from tests.data.stores import VOCAB
from tests.generation.run import SETTINGS, clip_params, make_run


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
  root = epath.Path(tmp_path_factory.mktemp("run"))
  make_run(root)
  return root


@pytest.fixture(scope="session")
def layout(workdir):
  return PromptLayout.of(Run(workdir, SETTINGS))


@pytest.fixture(scope="session")
def clip(workdir):
  encode = text.TextTokenizer(workdir / "text_tokenizer", VOCAB).encode
  return clip_lib.CLIP(SETTINGS.clip, VOCAB.text_size, clip_params(), encode)
