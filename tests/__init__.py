"""Makes this folder the package `tests`, because torch-fidelity installs a package `tests`, too."""
