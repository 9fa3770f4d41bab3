from benchmarks import decoding_table
from cm3leon_jax.config import UserError
from cm3leon_jax.evaluation.protocols import protocol as protocol_lib
from tests.refusals import refused


def result_of(protocol, published=()):
  found = {
    "frechet_distance": {"value": 0.25, "low": 0.125, "high": 0.5},
    "clip_score": {"value": 0.5, "low": None, "high": None},
  }
  columns = {column.name: {"metrics": found} for column in protocol.columns}
  about = {"metrics": list(found), "protocol": {"published": list(published)}}
  controls = {"noise": {"frechet_distance": {"value": 2.0}}}
  return {**about, "columns": columns, "controls": controls}


def test_each_weight_becomes_a_column_of_the_last_sampler():
  for name in ("scenes_decoding", "tutorial_decoding"):
    [protocol] = protocol_lib.load(name)
    more = decoding_table.with_guidance(protocol, [1.0, 2.5])
    assert [c.name for c in more.columns[-2:]] == ["guidance 1", "guidance 2.5"]
    assert more.columns[: len(protocol.columns)] == protocol.columns
    base = next(c for c in protocol.columns if c.name == decoding_table.BASE)
    assert more.columns[-1].sampling == {**base.sampling, "guidance": 2.5}


def test_a_protocol_without_the_sampler_is_refused():
  protocol, _ = protocol_lib.load("scenes")
  with refused(UserError):
    decoding_table.with_guidance(protocol, [1.0])


def test_the_table_has_intervals_controls_and_published_figures():
  [protocol] = protocol_lib.load("scenes_decoding")
  text = decoding_table.markdown(result_of(protocol))
  assert "| greedy | 0.25 [0.125, 0.5] | 0.5 |" in text
  assert "| control: noise | 2 | - |" in text
  published = ({"model": "m", "source": "s", "column": "greedy", "frechet_distance": 12.4},)
  lines = decoding_table.markdown(result_of(protocol, published)).split("\n")
  assert lines[0].endswith("| published: m, s |")
  assert lines[2] == "| greedy | 0.25 [0.125, 0.5] | 0.5 | 12.4 |"
  assert lines[3].endswith("| 0.5 | - |")


def test_the_plot_is_a_picture(tmp_path):
  [protocol] = protocol_lib.load("scenes_decoding")
  more = decoding_table.with_guidance(protocol, [1.0, 2.0])
  decoding_table.plot(result_of(more), [1.0, 2.0], tmp_path / "plot.png")
  assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
