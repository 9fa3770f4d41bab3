"""Makes this folder a package, because torch-fidelity also installs a package named `tests`."""
