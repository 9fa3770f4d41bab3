"""Tests packaging: metadata, the wheel, and the tested versions."""

import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

import cm3leon_jax

ROOT = pathlib.Path(__file__).parents[1]
METADATA = tomllib.loads((ROOT / "pyproject.toml").read_text())


def build(source, target) -> pathlib.Path:
  """Builds the wheel of the project in `source` without network access."""
  pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
  built = subprocess.run(
    [*pip, f"--wheel-dir={target}", "."], cwd=source, capture_output=True, text=True, check=False
  )
  assert built.returncode == 0, built.stderr
  return next(target.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """Builds the wheel from a copy of the repository, with a deleted module in build/."""
  source = tmp_path_factory.mktemp("source")
  for name in ("cm3leon_jax", "examples", "launch", "ml_configs", "tests"):
    shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
    shutil.copy(ROOT / name, source)
  (source / "build" / "lib" / "cm3leon_jax").mkdir(parents=True)
  (source / "build" / "lib" / "cm3leon_jax" / "removed.py").touch()
  return build(source, tmp_path_factory.mktemp("wheel"))


def test_metadata_and_package_have_one_version():
  assert METADATA["project"]["version"] == cm3leon_jax.__version__


def test_a_wheel_holds_the_package_and_nothing_else(wheel):
  with zipfile.ZipFile(wheel) as archive:
    names = archive.namelist()
  top = {name.split("/")[0] for name in names}
  assert top == {"cm3leon_jax", f"cm3leon_jax-{cm3leon_jax.__version__}.dist-info"}
  expected = {
    str(path.relative_to(ROOT))
    for pattern in ("*.py", "*.jinja", "*.yaml", "py.typed", "assets/**/*", "page/*", "docs/*.md")
    for path in (ROOT / "cm3leon_jax").rglob(pattern)
    if path.is_file()
  }
  assert expected == {name for name in names if name.startswith("cm3leon_jax/")}
  licenses = {name.partition("/licenses/")[2] for name in names} - {""}
  assets = ("tokenizers/pictures", "models/illustrations")
  attributions = {f"cm3leon_jax/assets/{name}/ATTRIBUTION.md" for name in assets}
  assert licenses == {"LICENSE", "NOTICE", *attributions}


def test_metadata_and_notice_name_the_licenses_of_the_bundled_models():
  files = (ROOT / "cm3leon_jax" / "assets").rglob("ATTRIBUTION.md")
  found = {x for file in files for x in re.findall(r": ([\w.-]+), https", file.read_text())}
  notice = (ROOT / "NOTICE").read_text()
  assert {"UFL-1.0", "CC-BY-2.0", "MIT"} < found
  assert not [name for name in found if name not in notice]
  spdx = {name.replace("UFL", "Ubuntu-font") for name in found}
  assert spdx <= set(METADATA["project"]["license"].split(" AND "))
  # Drawings of this set are retrieved, so the wheel has copies of them.
  assert "Copyright (c) Microsoft Corporation.\n\nPermission is hereby granted" in notice


@pytest.mark.slow
def test_the_installed_console_script_runs_a_shipped_config(wheel, tmp_path):
  site = tmp_path / "site"
  pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
  subprocess.run([*pip, f"--target={site}", str(wheel)], check=True)
  (tmp_path / "w").mkdir()
  script = next(path for path in (site / "bin").iterdir() if path.name == "cm3leon")
  result = subprocess.run(
    [sys.executable, script, "evaluate", "--config=cm3leon_350m", "--workdir=w"],
    cwd=tmp_path, env={"PYTHONPATH": str(site)}, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert result.returncode == 2
  assert result.stderr == (
    "error: w/documents is not finished: run `cm3leon encode_documents` with the same --config "
    "and --workdir first.\n"
  )


@pytest.mark.slow
def test_the_image_installs_dependencies_without_the_package(tmp_path):
  # launch/pod/Dockerfile copies the same files.
  for name in ("pyproject.toml", "requirements.txt", "constraints.txt"):
    shutil.copy(ROOT / name, tmp_path)
  with zipfile.ZipFile(build(tmp_path, tmp_path / "wheel")) as archive:
    assert all(".dist-info/" in name for name in archive.namelist())


def names_of(requirements) -> set[str]:
  """Returns names of packages, such as {"jax"} for ["jax[tpu]>=0.10; python_version < '3.12'"]."""
  return {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in requirements}


def test_requirements_are_those_of_a_run_and_constraints_the_others():
  texts = [(ROOT / name).read_text() for name in ("requirements.txt", "constraints.txt")]
  lines = [[line for line in text.splitlines() if line[0] not in "#-"] for text in texts]
  required, others = map(names_of, lines)
  own = {re.sub(r"\[.*\]", "", name) for name in names_of(METADATA["project"]["dependencies"])}
  assert required == own
  extras = METADATA["project"]["optional-dependencies"]
  for extra in ("data", "demo", "serve"):
    assert names_of(extras[extra]) <= others, extra
  assert "\n-c requirements.txt\n" in texts[1]


def test_the_range_of_jax_ends_at_the_tested_versions():
  (jax,) = (r for r in METADATA["project"]["dependencies"] if r.startswith("jax>"))
  tested = re.findall(r"^jax==([\d.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
  assert jax == f"jax>={tested[0]},<={tested[1]}"


def test_the_lock_of_ci_has_the_tested_versions_and_hashes_of_all():
  entries = re.split(r"\n(?=[a-z])", (ROOT / "requirements.lock").read_text())[1:]
  assert all("--hash=sha256:" in entry for entry in entries)
  locked = {entry.split(" ")[0] for entry in entries}
  for name in ("requirements.txt", "constraints.txt"):
    tested = re.findall(r"^[\w.-]+==[\w.]+", (ROOT / name).read_text(), re.MULTILINE)
    of_extras = {pin.lower() for pin in tested if names_of([pin]) & names_of(locked)}
    assert of_extras <= locked, "renew requirements.lock by the command in its first lines"
    assert len(of_extras) > 25
