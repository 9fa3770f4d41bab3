"""Runs protocols: files that define an evaluation, so that others can reproduce its numbers."""
