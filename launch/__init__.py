"""In a checkout, `python -m launch.NAME` runs the command `cm3leon_jax/commands/NAME.py`, as `cm3leon NAME` does."""

from cm3leon_jax import commands

__path__ = [*__path__, *commands.__path__]
