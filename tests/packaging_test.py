"""Tests packaging: metadata, the wheel, and the extras that scripts and files install."""

import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
import yaml

import cm3leon_jax

ROOT = pathlib.Path(__file__).parents[1]
METADATA = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = runpy.run_path(str(ROOT / ".ci" / "extras.py"))
PROMISED = (
  *("tpu", "cuda12", "cuda13", "data", "ray", "monitoring", "serve", "eval", "aot", "demo", "dev"),
)


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
  """Builds the wheel from a copy of the repository without build outputs."""
  source = tmp_path_factory.mktemp("source")
  for name in ("cm3leon_jax", "examples", "launch", "ml_configs", "tests"):
    shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, source)
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
    for pattern in ("*.py", "*.jinja", "*.yaml", "py.typed", "assets/**/*", "page/*")
    for path in (ROOT / "cm3leon_jax").rglob(pattern)
    if path.is_file()
  }
  assert expected == {name for name in names if name.startswith("cm3leon_jax/")}


@pytest.mark.slow
def test_the_installed_console_script_runs_a_shipped_config(wheel, tmp_path):
  site = tmp_path / "site"
  pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
  subprocess.run([*pip, f"--target={site}", str(wheel)], check=True)
  (tmp_path / "w").mkdir()
  script = next(path for path in (site / "bin").iterdir() if path.name == "cm3leon")
  result = subprocess.run(
    [sys.executable, script, "evaluate", "--config=scenes:15", "--workdir=w"],
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


def test_every_extra_that_a_file_installs_is_resolved_in_ci():
  declared, shipped = set(EXTRAS["declared"]()), EXTRAS["shipped"]()
  assert set(PROMISED) <= declared
  for extras, files in shipped.items():
    assert set(extras.split(",")) <= declared, files
  image = {f"{extra},data,monitoring" for extra in ("tpu", "cuda12", "cuda13")}
  assert image | {"demo", "demo,dev"} <= set(shipped)
  assert ".ci/extras.py" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize(
  ("text", "extras"),
  [
    ("make_venv tpu,data\n", {"tpu,data"}),
    ("pip install -e '.[aot]'\n", {"aot"}),
    ('case "$EXTRA" in a | b) ;;\npip install ".[$EXTRA,data]" -c', {"a,data", "b,data"}),
    ("make_venv() {\n  pip install -e .[$extra]", set()),
  ],
)
def test_extras_are_found_in_a_file(text, extras):
  assert EXTRAS["installed_by"](text) == extras


@pytest.mark.parametrize(
  ("text", "packages"),
  [
    ("python3 -m pip install --user --quiet uv\n", {(("uv",), ())}),
    ("- run: pip install 'mkdocs>=1.6,<2' -c constraints.txt", {(("mkdocs>=1.6,<2",), ())}),
    ("(`pip install a`), or `pip install b-c` and", {(("a",), ()), (("b-c",), ())}),
    ('python3.12 -m venv m && m/bin/pip install "a==1" \\\n  c', {(("a==1", "c"), ("3.12",))}),
    ("pip install -e '.[demo]' -c r.txt", set()),
    ("pip install cm3leon_jax-0.2.0-py3-none-any.whl", set()),
    ("pip install 'ray[data]>=2.51' a, set B: or", {(("ray[data]>=2.51", "a"), ())}),
  ],
)  # fmt: skip
def test_packages_are_found_in_a_file(text, packages):
  assert EXTRAS["packages_in"](text) == packages


def names_of(requirements) -> set[str]:
  """Returns names of packages, such as {"jax"} for ["jax[tpu]>=0.10; python_version < '3.12'"]."""
  return {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in requirements}


def test_the_python_of_the_image_is_one_that_is_resolved():
  text = (ROOT / "launch" / "pod" / "Dockerfile").read_text()
  (python,) = re.findall(r"^FROM python:(3\.\d+)-slim$", text, re.MULTILINE)
  assert python in EXTRAS["PYTHONS"]
  # CI runs the tests on this Python version, and tests the wheel on all versions.
  assert f'export PYTHON="${{PYTHON:-python{python}}}"' in (ROOT / ".ci/run").read_text()
  workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
  matrix = workflow["jobs"]["wheel"]["strategy"]["matrix"]["python"]
  assert tuple(matrix) == EXTRAS["PYTHONS"]
  classifiers = {f"Programming Language :: Python :: {version}" for version in matrix}
  assert classifiers <= set(METADATA["project"]["classifiers"])


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


def test_the_layout_of_the_project():
  for name in ("requirements.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md"):
    assert (ROOT / name).is_file(), name
  for name in ("cm3leon_jax", "launch", "ml_configs", "tests"):
    assert (ROOT / name / "__init__.py").is_file(), name
  assert len((ROOT / "setup.py").read_text().splitlines()) < 10


def test_the_wheel_is_tried_only_on_a_python_that_is_there():
  """A missing Python version causes an error message and a failure, not a skip."""
  result = subprocess.run(
    ["bash", ROOT / ".ci" / "wheel.sh", "python3.99"], capture_output=True, text=True, check=False
  )
  assert result.returncode == 2
  assert result.stderr.startswith("error: 'python3.99' does not run")
  assert "install Python 3.13" in result.stderr
