"""Lists mutants of the commands and their output."""

from tests.mutant_lists.mutant import Mutant

_ARGUMENTS = "cm3leon_jax/commands/arguments.py"
_ARGUMENTS_TEST = "tests/commands/arguments_test.py"
_SENTENCES = f"{_ARGUMENTS_TEST}::test_a_mistake_is_one_sentence_and_imports_no_jax"

COMMANDS = (
  Mutant(
    "a_value_of_the_config_is_taken_for_a_word",
    _ARGUMENTS,
    "if match[1] is None and remaining and",
    "if match[1] and remaining and",
    (f"{_ARGUMENTS_TEST}::test_flags_of_the_config_are_separated",),
  ),
  Mutant(
    "any_path_named_like_a_shipped_config_is_that_config",
    "cm3leon_jax/commands/config_file.py",
    'path.stem if name == f"ml_configs/{path.stem}.py" else name',
    "path.stem",
    (
      "tests/commands/config_file_test.py::test_the_path_in_a_checkout_is_a_name_where_there_is_none",
    ),
  ),
  Mutant(
    "every_error_of_orbax_is_left_out",
    "cm3leon_jax/files/disk_errors.py",
    "record.exc_info and is_full(record.exc_info[1])",
    "record.exc_info",
    ("tests/files/disk_errors_test.py",),
  ),
  Mutant(
    "the_bank_of_a_bundle_has_the_ids_of_the_model",
    "cm3leon_jax/commands/generate.py",
    "**ids(bank, read)}",
    "**ids(trained, read)}",
    ("tests/commands/generate_test.py",),
  ),
)
