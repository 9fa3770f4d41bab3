"""Lets tools that look for setup.py build the package; all metadata is in pyproject.toml."""

import setuptools

setuptools.setup()
