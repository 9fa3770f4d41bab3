from etils import epath

from cm3leon_jax.commands.run_start import goes_on, print_more
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.runs import stages


def test_a_training_with_too_few_steps_continues_unless_it_ended_by_forgetting(tmp_path, capsys):
  folder = epath.Path(tmp_path)
  for summary, expected in (({"steps": 5}, True), ({"steps": 5, "forgetting": 0.04}, False)):
    write_json(folder / stages.DONE, {"config": {}, "summary": summary})
    assert goes_on(folder, {}, 9, []) == expected
    print_more(folder)
    assert ("would continue" in capsys.readouterr().out) == expected
