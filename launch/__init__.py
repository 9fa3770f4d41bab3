"""Entry of a checkout: `python -m launch.NAME` runs `cm3leon_jax/commands/NAME.py`."""

from cm3leon_jax import commands

__path__ = [*__path__, *commands.__path__]
