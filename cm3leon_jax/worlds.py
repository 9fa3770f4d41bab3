"""Names of the worlds that come with the package; `evaluation.world` finds them by it.

A world draws its images itself and so knows exactly what they show. `raw.source` may name it, and
the format of a task of instruction tuning.
"""

# Name -> module that has it as WORLD. It is imported when it is asked for.
MODULES = {"scenes": "cm3leon_jax.scenes.interface"}


def world_of_format(name: str) -> str:
  """Returns the name of the world that draws the records of a format; "" if files hold them.

  world_of_format("scenes/count") = "scenes", world_of_format("jsonl") = ""
  """
  world, slash, _ = name.partition("/")
  return world if slash and world in MODULES else ""
