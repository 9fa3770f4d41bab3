"""A package, so that `tests` is this folder: torch-fidelity installs a package of that name."""
