"""Build hook: everything is declared in pyproject.toml.

Never import torch here: builds run isolated, where it is not installed.
"""

from setuptools import setup

setup()
