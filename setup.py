"""Builds from a clean folder. All metadata is in pyproject.toml."""

import shutil

import setuptools
from setuptools.command.build_py import build_py


class CleanBuild(build_py):
  """Removes build/lib first: it has the modules that were deleted since the previous build."""

  def run(self) -> None:
    shutil.rmtree(self.build_lib, ignore_errors=True)
    super().run()


setuptools.setup(cmdclass={"build_py": CleanBuild})
