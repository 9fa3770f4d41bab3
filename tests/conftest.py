"""Gives every test 8 CPU devices; makes implicit rank promotion and wrong annotations raise."""

import functools
import gc
import os
import pathlib
import platform
import re
import signal

from tests import compiled

os.environ["JAX_PLATFORMS"] = "cpu"
# Without optimizations, tests compile faster, which saves more time than slower computations cost.
# Subprocesses inherit the variable; tests/planning removes it and compiles for TPU.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# Otherwise XLA may start collectives in a different order on each device. With few CPU cores they
# then deadlock, and XLA ends the process after 40 s.
os.environ["XLA_FLAGS"] = (
  "--xla_force_host_platform_device_count=8"
  " --xla_cpu_enable_concurrency_optimized_scheduler=false"
  " --xla_cpu_collective_call_terminate_timeout_seconds=300"
  # Compiling one program in several threads takes more CPU time in total.
  " --xla_cpu_parallel_codegen_split_count=1"
  # The newer fusion emitters take more than twice as long. jaxlib 0.12 has only those.
  " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)
if platform.machine() == "x86_64":
  # Newer instruction sets have fused multiply-add, which makes equivalent programs differ in the
  # last bit.
  os.environ["XLA_FLAGS"] += " --xla_cpu_max_isa=AVX"

# Compiling takes most of the time, so later test runs reuse the compiled programs.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compiled.folder()))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

from etils import epath
import hypothesis
import jax
from jaxtyping import install_import_hook
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing creates many objects, but few reference cycles. Less frequent garbage collection saves 12%
# of the time.
gc.set_threshold(200_000, 50, 100)
CHECKED = [
  f"cm3leon_jax.{package}" for package in ("clip", "decoding", "models", "tokenizers", "training")
]
install_import_hook(CHECKED, "beartype.beartype")
# On a busy machine, an example sometimes takes longer than hypothesis' 200 ms.
hypothesis.settings.register_profile("no_deadline", deadline=None)
hypothesis.settings.load_profile("no_deadline")


# Linux limits a process to 65,530 memory maps, and each compiled program takes several.
MOST_MAPS = 14_000
MAPS = pathlib.Path("/proc/self/maps")
ORACLES = re.compile(r'importorskip\("(torch|transformers|diffusers|torchvision|compressed_)')


@functools.cache
def _group(path: pathlib.Path) -> str:
  """Returns the group of a test file; each group runs in one process (--dist=loadgroup).

  To save memory, the server tests form one group, and the files that import torch another.
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
def _foreground():
  """Makes Ctrl-C reach the tests and their processes: shells ignore SIGINT in background jobs."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="session")
def _short_waits():
  """Shortens the waiting times of jobs that acquire a lease."""
  from cm3leon_jax.training.faults import lease

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(lease, "POLL_SECONDS", 0.2)
    patch.setattr(lease, "SETTLE_SECONDS", 0.02)
    yield


@pytest.fixture(autouse=True, scope="module")
def _few_maps():
  """Clears compiled programs after a test module if the process has too many memory maps."""
  yield
  if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
    jax.clear_caches()
    gc.collect()


# Reasons for which a test may be skipped; each is a property of the machine. Any other skip, such
# as for a missing package, fails the session, because it would hide tests.
SKIPS = (
  "needs Linux",
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
  # pytest and Python collect garbage six times at the end. After the first, there is no more.
  gc.collect()
  gc.freeze()


def pytest_terminal_summary(terminalreporter, config):
  reasons = _skips(config)
  unknown = sorted(set(reasons) - set(SKIPS))
  terminalreporter.write_line(
    f"skipped tests: {len(reasons)}{': ' * bool(unknown)}" + "; ".join(unknown)
  )


@pytest.fixture
def optimized():
  """Lets XLA optimize the programs of a test whose computations are long."""
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
  """Returns a tiny run, to which tests may add samples, but whose stages they must not change."""
  from tests.generation.run import save_run

  root = epath.Path(tmp_path_factory.mktemp("saved"))
  save_run(root)
  return root


@pytest.fixture(scope="session")
def model(run):
  from cm3leon_jax import CM3Leon

  return CM3Leon.load(run, devices=jax.devices()[:1])
