"""Every test sees 8 CPU devices; hidden rank promotion and a wrong annotation are errors."""

import functools
import gc
import os
import pathlib
import platform
import re

from tests import compiled

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile more than they compute; subprocesses inherit it, too.
# tests/planning compiles for TPU without it.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# Else XLA may start collectives in another order on each device; on few cores they then wait for
# each other, and XLA ends the process after 40 s.
os.environ["XLA_FLAGS"] = (
  "--xla_force_host_platform_device_count=8"
  " --xla_cpu_enable_concurrency_optimized_scheduler=false"
  " --xla_cpu_collective_call_terminate_timeout_seconds=300"
  # Split over threads, a program takes more processor time to compile.
  " --xla_cpu_parallel_codegen_split_count=1"
  # The newer emitters of fusions compile for more than twice as long; jaxlib 0.12 has no others.
  " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)
if platform.machine() == "x86_64":
  # Later instructions multiply and add with one rounding, where a fusion allows it: two programs
  # that compute the same would differ in the last bit.
  os.environ["XLA_FLAGS"] += " --xla_cpu_max_isa=AVX"

# Compiling takes most of the time: a later run of the tests on such a machine reads the programs.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compiled.folder()))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import hypothesis
import jax
from jaxtyping import install_import_hook
import pytest

pytest_plugins = ["tests.messages", "tests.processor_time"]
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing makes many objects, few of them in reference cycles: looking for these rarely saves 12%.
gc.set_threshold(200_000, 50, 100)
CHECKED = [
  f"cm3leon_jax.{package}" for package in ("clip", "decoding", "models", "tokenizers", "training")
]
install_import_hook(CHECKED, "beartype.beartype")
# A deadline of 200 ms an example is missed now and then on a busy machine.
hypothesis.settings.register_profile("no_deadline", deadline=None)
hypothesis.settings.load_profile("no_deadline")


# Linux allows a process 65,530 maps of memory, and a compiled program takes several.
MOST_MAPS = 14_000
MAPS = pathlib.Path("/proc/self/maps")
ORACLES = re.compile(r'importorskip\("(torch|transformers|diffusers|torchvision|compressed_)')


@functools.cache
def _group(path: pathlib.Path) -> str:
  """Returns the group of a file of tests, which stays in one process (--dist=loadgroup).

  So do the files of the served engine, and those that import torch: one process has it in memory.
  """
  root = pathlib.Path(__file__).parent
  if root / "serving" in path.parents:
    return "serving"
  if ORACLES.search(path.read_text(encoding="utf-8")):
    return "torch"
  return str(path.relative_to(root))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
  for item in items:
    item.add_marker(pytest.mark.xdist_group(_group(item.path)))


@pytest.fixture(autouse=True, scope="session")
def _short_waits():
  """Shortens the waits of whoever takes a lease: for signs of life, and for others that take it."""
  from cm3leon_jax.training.faults import lease

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(lease, "POLL_SECONDS", 0.2)
    patch.setattr(lease, "SETTLE_SECONDS", 0.02)
    yield


@pytest.fixture(autouse=True, scope="module")
def _few_maps():
  """Forgets compiled programs after a module when they have taken many maps."""
  yield
  if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
    jax.clear_caches()
    gc.collect()


# Reasons to skip a test that only a machine can have. Another one, such as an absent package,
# would hide tests: it fails the session.
SKIPS = (
  "an option of Linux",
  "needs systemd-analyze",
  "this machine has an accelerator",
  "torch without oneDNN",
)


def _skips(config) -> list[str]:
  reporter = config.pluginmanager.get_plugin("terminalreporter")
  reports = reporter.stats.get("skipped", []) if reporter else []
  return [report.longrepr[2].removeprefix("Skipped: ") for report in reports]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
  if session.exitstatus == 0 and set(_skips(session.config)) - set(SKIPS):
    session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
  reasons = _skips(config)
  unknown = sorted(set(reasons) - set(SKIPS))
  terminalreporter.write_line(
    f"skipped tests: {len(reasons)}{': ' * bool(unknown)}" + "; ".join(unknown)
  )


@pytest.fixture
def optimized():
  """Lets XLA optimize the programs of a test that computes for long."""
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)
