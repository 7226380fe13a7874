"""The version of the installed package, which pyproject.toml alone states."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fisherkern")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "unknown"
