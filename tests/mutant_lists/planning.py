"""Lists mutants of the planner: hardware names, costs of stages, launcher files."""

from tests.mutant_lists.mutant import mutants_of

HARDWARE = "tests/planning/hardware_test.py"
COSTS = "tests/planning/stage_costs_test.py"

PLANNING = mutants_of(
  "cm3leon_jax/planning/hardware.py",
  ("a_pod_asks_for_all", "return cpus // 2, memory // 2", "return cpus, memory"),
  "cm3leon_jax/planning/stage_costs.py",
  f"{COSTS}::test_training_costs_what_the_plan_says_and_the_small_trainings_their_steps",
  ("a_backward_pass_is_free", "hours = chips(3 * seen * (image + text))", "hours = chips(seen)"),
  f"{COSTS}::test_published_models_have_their_own_costs_and_no_training",
  ("an_import_costs_a_training", "if not settings.vqgan.published:", "if True:"),
  "cm3leon_jax/planning/launchers/__init__.py",
  "tests/planning/files_test.py",
  ("spot_and_reserved", "if job.reservation and job.spot:", "if False:"),
)
