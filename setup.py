"""Supports tools that look for setup.py. All metadata is in pyproject.toml."""

import setuptools

setuptools.setup()
