import copy

from etils import epath
import pytest

from cm3leon_jax.config.settings import default_config, settings_from_config
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import plain
from cm3leon_jax.run.changes import MAY_CHANGE, check_changes
from cm3leon_jax.stages.table import identity
from tests.refusals import refused

SETTINGS = settings_from_config(default_config())
RUN = plain({**identity(SETTINGS, "train"), "inputs": {"documents": "1"}})
RATE = "optimizer.learning_rate"


def check(*allowed, stored=RUN, **fields):
  """Checks whether a run may change config fields from the default, e.g. `optimizer__eps=1e-6`."""
  config = copy.deepcopy(RUN)
  for name, value in fields.items():
    section, _, field = name.partition("__")
    if field:
      config[section][field] = value
    else:
      config[section] = value
  return check_changes(epath.Path("w/train"), stored, config, allowed)


def test_a_change_that_is_allowed_is_described():
  assert check(RATE) == []
  assert check(RATE, optimizer__learning_rate=0.5) == [f"{RATE}: 0.0001 -> 0.5"]
  both = check(
    "train.global_batch_size", RATE, optimizer__learning_rate=0.5, train__global_batch_size=4
  )
  assert [sentence.partition(":")[0] for sentence in both] == [RATE, "train.global_batch_size"]


def test_every_field_that_may_change_exists():
  for name in MAY_CHANGE:
    section, field = name.split(".")
    assert field in RUN[section]


FASTER = {"optimizer__learning_rate": 0.5}
NO_FIELDS = ["model.width", "optimizer.name", "seed", "learning_rate"]
REFUSED = [
  ("optimizer.eps", FASTER | {"optimizer__eps": 1e-6},
   [f"--allow_changed=optimizer.eps,{RATE}", "0.0001 -> 0.5"]),
  (RATE, FASTER | {"model__width": 8}, ["model.width"]),
  (RATE, {"inputs": {"documents": "2"}}, ["inputs.documents"]),
  *((name, {}, ["--allow_changed", f"'{name}'", RATE]) for name in NO_FIELDS),
]  # fmt: skip


@pytest.mark.parametrize(("allowed", "fields", "facts"), REFUSED)
def test_another_change_is_refused_with_its_fields_or_the_flag(allowed, fields, facts):
  with refused(UserError, *facts):
    check(allowed, **fields)


def test_an_average_may_change_its_rate_but_neither_begin_nor_end():
  average = {**RUN, "optimizer": {**RUN["optimizer"], "ema_decay": 0.9}}
  name = "optimizer.ema_decay"
  assert check(name, stored=average, optimizer__ema_decay=0.99)
  for allowed in ((), (name,)):
    with refused(UserError, name) as error:
      check(*allowed, stored=average)  # The default `ema_decay` of 0 stops averaging.
    assert "--allow_changed=" not in str(error.value)
