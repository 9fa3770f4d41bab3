"""Mutants of the planner: hardware by its names, costs of stages, files of launchers."""

from tests.mutant_lists.mutant import mutants_of

HARDWARE = "tests/planning/hardware_test.py"
COSTS = "tests/planning/stage_costs_test.py"
FILES = "tests/planning/files_test.py"

PLANNING = (
  *mutants_of(
    "cm3leon_jax/planning/topology.py",
    HARDWARE,
    ("cloud_names_are_unknown", "ALIASES.get(chip, chip)", "chip"),
    ("nearest_by_difference", "max(n, int(size)) / min(n, int(size))", "n"),
  ),
  *mutants_of(
    "cm3leon_jax/planning/hardware.py",
    HARDWARE,
    ("a_pod_asks_for_all", "return cpus // 2, memory // 2", "return cpus, memory"),
  ),
  *mutants_of(
    "cm3leon_jax/planning/stage_costs.py",
    COSTS,
    ("half_of_the_queries", "queries = 2 * pairs", "queries = pairs"),
    ("a_backward_pass_is_free", "hours = chips(3 * seen * (image + text))", "hours = chips(seen)"),
    ("text_costs_nothing", "cores(pairs, READ) + cores(texts, ENCODED)", "cores(pairs, READ)"),
    ("neighbors_are_new_pairs", "document * (1 + settings.data.num_neighbors)", "document"),
  ),
  *mutants_of(
    "cm3leon_jax/planning/launchers/__init__.py",
    FILES,
    ("spot_and_reserved", "if job.reservation and job.spot:", "if False:"),
    ("any_reservation", '("reservation", job.reservation),', '("reservation", ""),'),
    ("an_ignored_priority", "priority * (job.priority not in XPK_PRIORITIES)", "''"),
  ),
)
