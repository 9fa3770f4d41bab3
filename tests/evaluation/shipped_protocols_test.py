"""Tests every protocol of the package on tiny files in the format of its release."""

import dataclasses
import html
import json
import math
import pathlib
import shutil

from etils import epath
import pytest

from cm3leon_jax.commands import common, evaluate
from cm3leon_jax.config.settings import settings_from_config
from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation.protocols import protocol as protocol_lib
from cm3leon_jax.evaluation.protocols import results, run
from cm3leon_jax.reports import evaluation_page
from cm3leon_jax.run.run import Run
from tests.evaluation.protocol_runs import make_data, make_workdir
from tests.generation.run import make_config

# One protocol for answers and one for captions. `protocol_run_test.py` covers one for images.
FAST = ("cm3leon_table2/vqa_v2", "cm3leon_table2/coco")
PROTOCOLS = [
  pytest.param(name, protocol, id=name, marks=[] if name in FAST else [pytest.mark.slow])
  for file in protocol_lib.names()
  for name, protocol in protocol_lib.load(file).items()
]


@pytest.fixture(scope="module")
def settings():
  config = make_config(positions=512)
  config.evaluation.update({"num_resamples": 100, "batch_size": 16})
  return settings_from_config(config)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, settings):
  return make_workdir(epath.Path(tmp_path_factory.mktemp("run")), settings)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return str(make_data(tmp_path_factory.mktemp("data")))


def tiny(protocol):
  """Returns the protocol for all examples, with the image size and the CLIP model of the run.

  Removes the metric `judged`, because the generated images show no scenes.
  """
  return dataclasses.replace(
    protocol,
    data=dataclasses.replace(protocol.data, count=0),
    extractor="clip" if protocol.extractor else "",
    resolution=0,
    metrics=tuple(name for name in protocol.metrics if name != "judged"),
  )


def measure(settings, workdir, name, protocol, **options):
  trained, options = Run.open(workdir, settings), run.Options(**options)
  with common.use_mesh(settings):
    job, result = run.run(trained, name, run.completed(protocol, options, settings), options)
    evaluation_page.write(job, result)
  return job.folder, result


@pytest.mark.slow
@pytest.mark.parametrize(("name", "protocol"), PROTOCOLS)
def test_every_protocol_runs_to_its_results(name, protocol, settings, workdir, data):
  protocol = tiny(protocol)
  heldout = protocol.data.format == protocol_lib.HELDOUT
  folder, result = measure(settings, workdir, name, protocol, data=None if heldout else data)
  assert set(result["columns"]) == {column.name for column in protocol.columns}
  for column in result["columns"].values():
    assert set(column["metrics"]) == set(protocol.metrics)
    for metric, found in column["metrics"].items():
      if metric != "copy_rate":
        assert math.isfinite(found["value"])
        assert found.get("low") is None or found["low"] <= found["high"]
  assert result["controls"][run.SHUFFLED]
  assert json.loads((folder / "results.json").read_text()) == result
  assert protocol.title in html.unescape((folder / "report.html").read_text())
  text = results.describe(result)
  assert all(row["source"] in text for row in protocol.published)


@pytest.mark.slow
def test_images_are_in_the_folder_of_the_files_unless_they_are_trusted(
  settings, workdir, data, tmp_path
):
  linked = pathlib.Path(shutil.copytree(data, tmp_path / "data"))
  (linked / "val2014").rename(tmp_path / "val2014")
  (linked / "val2014").symlink_to(tmp_path / "val2014")
  protocol = tiny(protocol_lib.load("tutorial_decoding")["tutorial_decoding"])
  protocol = dataclasses.replace(protocol, metrics=("copy_rate",))
  with pytest.raises(UserError, match=r"image 'val2014/.*' is not in .*; put it there, or"):
    measure(settings, workdir, "x", protocol, data=linked)
  _, result = measure(settings, workdir, "x", protocol, data=linked, allow_outside=True)
  assert result["columns"]


@pytest.mark.skipif(not shutil.which("java"), reason="needs Java")
def test_the_command_measures_all_protocols_of_a_file_and_reuses_samples_for_other_metrics(
  settings, workdir, data, tmp_path, capsys
):
  file = tmp_path / "mine.yaml"
  one = """
name: {name}
title: captions {name}
task: text
template: "{template}"
data: {{format: coco_karpathy, split: test, count: 0}}
columns: [{{name: greedy, length: 3, sampling: {{text_top_k: 1}}}}]
metrics: [cider]
"""
  texts = (one.format(name=n, template=t) for n, t in (("a", "<mask>"), ("b", "Look: <mask>")))
  file.write_text("---".join(texts))
  for metrics in (("bleu4", "exact_match"), ("exact_match",)):
    asked = evaluate.Flags(protocol=str(file), data=data, metrics=metrics)
    evaluate.main(settings, workdir, asked)
  printed = capsys.readouterr().out
  assert "captions a: 2 examples\n  greedy: BLEU-4 " in printed
  assert "captions b: 2 examples\n  greedy: BLEU-4 " in printed
  folder = workdir / "evaluations"
  for name in ("mine-a", "mine-b"):
    assert len(list(folder.glob(f"{name}-*/results.json"))) == 2
    assert len(list(folder.glob(f"samples/{name}-*"))) == 1
