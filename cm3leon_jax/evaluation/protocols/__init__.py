"""Protocols: files that say what is measured and how, so that a number can be repeated."""
