"""Runs the commands from a checkout: one module per command, and scripts for clusters."""
