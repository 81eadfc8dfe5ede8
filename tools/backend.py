"""The build backend: setuptools' own, building against the torch that the environment already has.

pip builds in a separate environment that hides the user's packages. A second torch would be gigabytes to fetch, so ask
the same interpreter, without pip's variables, where it looks for packages, and append that to the path of the build: at
the end, where the build environment's own packages win.
"""

import importlib.metadata
import subprocess
import sys

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

TORCH = "torch>=2.11"


def has_torch() -> bool:
    """Whether torch is importable here, as far as its metadata says."""
    try:
        return importlib.metadata.version("torch") is not None
    except importlib.metadata.PackageNotFoundError:
        return False


def see_environment() -> None:
    """Appends the module search path of this interpreter as it is outside of the build."""
    command = [sys.executable, "-E", "-c", "import sys; print(*sys.path, sep='\\n')"]
    outside = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    sys.path.extend(path for path in outside if path and path not in sys.path)


def get_requires_for_build_wheel(config_settings=None):
    """What to install before the build; setup.py's checks run here, so that they come before any download."""
    requires = build_meta.get_requires_for_build_wheel(config_settings)
    return requires if has_torch() else [*requires, TORCH]


get_requires_for_build_editable = get_requires_for_build_wheel


def get_requires_for_build_sdist(config_settings=None):
    """Nothing: an sdist is made without torch or a compiler."""
    return []


if not has_torch():
    see_environment()
