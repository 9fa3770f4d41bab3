import pathlib

from etils import epath
import pytest

from cm3leon_jax.commands import common, config_file, run, stage_process
from cm3leon_jax.config.settings import settings_from_config
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.run import pace
from cm3leon_jax.stages import stages
from tests.launched import INSTRUCT, SCENES
from tests.refusals import refused

DEMO = [
  "prepare_data", "train_text_tokenizer", "train_vqgan", "encode_documents", "train_clip",
  "build_neighbors", "train", "generate", "evaluate", "export", "report",
]  # fmt: skip
TUNING = [
  "copy_tokenizers", "prepare_data", "encode_documents", "build_neighbors", "encode_instructions",
  "train", "report",
]  # fmt: skip


def settings_of(name, **fields):
  config = config_file.load(name)
  config.update_from_flattened_dict(fields)
  return settings_from_config(config)


def test_a_run_has_the_stages_of_the_demo_in_order():
  assert list(run.commands(settings_of(SCENES), given=False)) == DEMO
  example = str(pathlib.Path(__file__).parents[2] / "examples" / "illustrations" / "config.py")
  assert list(run.commands(settings_of(example), given=False)) == DEMO


def test_a_run_that_tunes_starts_from_the_tokenizers_of_another():
  assert list(run.commands(settings_of(INSTRUCT), given=True)) == TUNING
  without = settings_of(INSTRUCT, **{"instructions.replay_share": 0.0})
  raw = ("prepare_data", "encode_documents", "build_neighbors")
  assert list(run.commands(without, given=True)) == [n for n in TUNING if n not in raw]


def test_a_run_trains_no_clip_if_it_has_a_published_one():
  published = settings_of(SCENES, **{"retrieval.clip": "openai/clip-vit-base-patch32"})
  assert list(run.commands(published, given=False)) == [n for n in DEMO if n != "train_clip"]


@pytest.fixture
def started(monkeypatch):
  """Fakes each stage of a run: it only prints some lines. Returns the calls (command, flags)."""
  calls = []

  def start(self, command, flags, show):
    calls.append((command, flags))
    show(f"{command}: 3 pairs")
    show(f"{command}: shards 2, train_pairs 3")
    show("Warning: one is odd")
    show("train: warning: it ended")
    show("error: which the end of the run says")
    show("50%|##   | 1/2 [00:01<00:01, 1.0s/it]")

  monkeypatch.setattr(run.common, "config_arguments", lambda: ["--config=c"])
  monkeypatch.setattr(run.common, "open_fields", lambda: ["train.steps"])
  monkeypatch.setattr(stage_process.StageProcesses, "run", start)
  monkeypatch.setattr(stage_process.StageProcesses, "__init__", lambda self, logs: None)
  return calls


def test_each_stage_prints_one_line_and_data_and_report_say_what_they_found(
  started, tmp_path, capsys
):
  run.main(settings_of(SCENES), epath.Path(tmp_path), run.Flags())
  assert [command for command, _ in started] == DEMO
  assert all(flags == ["--config=c", f"--workdir={tmp_path}"] for _, flags in started)
  lines = capsys.readouterr().out.splitlines()
  assert lines[:3] == [
    "  prepare_data: 3 pairs", "  Warning: one is odd", "  train: warning: it ended",
  ]  # fmt: skip
  assert len([line for line in lines if line.startswith("[")]) == 11
  said = [line for line in lines if "3 pairs" in line]
  assert said == ["  prepare_data: 3 pairs", "  report: 3 pairs"]
  assert not [line for line in lines if "error:" in line]
  assert lines.count("  Warning: one is odd") == lines.count("  train: warning: it ended") == 11
  assert lines[-1] == "[11/11] report: 0 s"


def test_a_run_with_minutes_takes_the_steps_that_fit(started, tmp_path, capsys, monkeypatch):
  folder, plain = epath.Path(tmp_path), stage_process.StageProcesses.run

  def measure(self, command, flags, show):
    if any(flag.startswith("--measure_after=") for flag in flags):
      pace.write(folder, pace.Pace(15.0, 200.0, 0.25, 380, 1_200))
    plain(self, command, flags, show)

  monkeypatch.setattr(stage_process.StageProcesses, "run", measure)
  for _ in range(2):  # The second time, it keeps the decision.
    run.main(settings_of(SCENES, **{"train.minutes": 15.0}), folder, run.Flags())
  trainings = [flags[2:] for command, flags in started if command == "train"]
  steps = [
    "--config.train.steps=1200", "--config.train.checkpoint_every=100",
    "--config.train.eval_every=150", "--config.train.sample_every=400",
  ]  # fmt: skip
  assert [len(flags) for flags in trainings] == [1, 4, 4]
  assert trainings[1:] == [steps, steps]
  assert all(flags[2:] == steps for command, flags in started if command == "evaluate")
  assert capsys.readouterr().out.count("1,200 steps fit into 15 minutes") == 1


def test_the_time_of_finished_stages_counts_after_a_new_start(started, tmp_path, monkeypatch):
  """The run was stopped in `train_clip`, before it measured a step."""
  folder, after = epath.Path(tmp_path), []
  for stage in ("raw", "vqgan", "documents"):
    write_json(folder / stage / stages.DONE, {"seconds": 100.0})

  def measure(self, command, flags, show):
    for flag in flags:
      if flag.startswith("--measure_after="):
        after.append(float(flag.partition("=")[2]))
        pace.write(folder, pace.Pace(15.0, 300.0, 0.25, 380, 1_200))

  monkeypatch.setattr(stage_process.StageProcesses, "run", measure)
  run.main(settings_of(SCENES, **{"train.minutes": 15.0}), folder, run.Flags())
  assert after == [pytest.approx(300, abs=30)]


@pytest.mark.parametrize("flag", ["--config.train.steps=7", "--config.train.log_every=7"])
def test_steps_of_the_user_are_not_measured(started, tmp_path, monkeypatch, flag):
  """The user sets steps by a flag although the config has none, or in the config."""
  given = ["--config=c", flag]
  monkeypatch.setattr(run.common, "config_arguments", lambda: given)
  settings = settings_of(SCENES, **{"train.minutes": 15.0})
  if "steps" not in flag:
    monkeypatch.setattr(run.common, "open_fields", lambda: [])
  run.main(settings, epath.Path(tmp_path), run.Flags())
  assert [flags for command, flags in started if command == "train"] == [
    [*given, f"--workdir={tmp_path}"]
  ]


def test_a_run_that_tunes_names_its_start_to_two_stages(started, tmp_path):
  run.main(settings_of(INSTRUCT), epath.Path(tmp_path), run.Flags(init_from="scenes"))
  extra = {command: flags[2:] for command, flags in started if flags[2:]}
  start = ["--init_from=scenes"]
  assert extra == {"copy_tokenizers": start, "train": start}


def test_a_run_on_a_base_measures_what_it_forgets():
  own = settings_of(SCENES, **{"data.base_documents": 9})
  names = list(run.commands(own, given=True))
  assert names == [
    "copy_tokenizers", "prepare_data", "train_vqgan", "encode_documents", "build_neighbors",
    "train", "generate", "evaluate", "measure_forgetting", "export", "report",
  ]  # fmt: skip
  copied = settings_of(SCENES, **{"data.base_documents": 9, "vqgan.source": ""})
  without = [name for name in names if name != "train_vqgan"]
  assert list(run.commands(copied, given=True)) == without
  for settings in (own, copied):
    assert list(run.commands(settings, given=True, own_images=True)) == names
  tuned = settings_of(INSTRUCT, **{"data.base_documents": 9})
  last = list(run.commands(tuned, given=True))[-3:]
  assert last == ["train", "measure_forgetting", "report"]


def test_the_decoder_of_a_tokenizer_for_any_image_may_be_trained_on_but_not_by_instructions():
  name = str(pathlib.Path(__file__).parents[2] / "examples" / "illustrations" / "config.py")
  names = list(run.commands(settings_of(name), given=True))
  assert names[:3] == ["copy_tokenizers", "prepare_data", "train_vqgan"]
  copied = settings_of(name, **{"vqgan.source": ""})
  assert "train_vqgan" not in run.commands(copied, given=True)
  fields = {"instructions.tasks": "t.yaml", "instructions.replay_share": 0.5}
  tuned = list(run.commands(settings_of(name, **fields), given=True))
  assert "prepare_data" in tuned
  assert "train_vqgan" not in tuned


@pytest.mark.parametrize("source", ["", "missing", "empty", "images"])
def test_a_wrong_source_is_refused_before_the_first_stage(source, started, tmp_path):
  (tmp_path / "empty").mkdir()
  (tmp_path / "images").mkdir()
  (tmp_path / "images" / "a.png").touch()
  settings = settings_of(SCENES, **{"raw.source": source and str(tmp_path / source)})
  with refused(UserError, "config.raw.source", source):
    run.main(settings, epath.Path(tmp_path / "w"), run.Flags(init_from="scenes"))
  assert not started
  assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
  ("base", "flag", "expected"),
  [("", "", ""), ("", "a", "a"), ("b", "", "b"), ("b", "a", "a"), ("b", "none", "")],
)
def test_a_run_starts_from_the_base_of_its_config_unless_told_otherwise(base, flag, expected):
  assert common.parent_of(base, flag) == expected


def test_an_own_image_tokenizer_belongs_to_a_base(tmp_path):
  with refused(UserError, "--own_image_tokenizer", "--init_from"):
    run.main(settings_of(SCENES), epath.Path(tmp_path), run.Flags(own_image_tokenizer=True))


def test_a_limit_of_forgetting_needs_documents_of_the_base(started, tmp_path):
  fields = {"train.max_forgetting": 0.03}
  folder = epath.Path(tmp_path)
  with refused(UserError, "max_forgetting", "base_documents"):
    run.main(settings_of(INSTRUCT, **fields), folder, run.Flags(init_from="scenes"))
  assert started == []
  assert not list(folder.iterdir())
  with_documents = settings_of(INSTRUCT, **fields, **{"data.base_documents": 9})
  run.main(with_documents, folder, run.Flags(init_from="scenes"))
  assert started
