"""The version of the package, importable without its face."""

from typing import Final

__version__: Final = "0.1.0"
