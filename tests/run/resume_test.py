from etils import epath

from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.run.resume import print_more, resumes
from cm3leon_jax.stages import stages


def test_a_training_with_too_few_steps_continues_unless_it_ended_early(tmp_path, capsys):
  folder = epath.Path(tmp_path)
  early = {"max_forgetting": {"forgetting": 0.04}, "patience": {"overfitting": True}}
  for said, ended in {"would continue": {}, **early}.items():
    write_json(folder / stages.DONE, {"config": {}, "summary": {"steps": 5, **ended}})
    assert resumes(folder, {}, 9, []) != bool(ended)
    print_more(folder)
    assert said in capsys.readouterr().out
