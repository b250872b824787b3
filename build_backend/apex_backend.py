"""PEP 517 backend: setuptools, with the torch that is installed instead of one that pip would download.

With build isolation on, the hooks run where the target environment's packages cannot be imported. They look into it
from outside (apex_toolchain.find_torch), ask the front end for the tools that are missing there, nvcc among them
(apex_nvcc), and read the others from it. With isolation off there is nothing to look for and the same code holds.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from types import ModuleType
from typing import Any

import apex_nvcc
import apex_toolchain

Settings = dict[str, Any] | None


def _setuptools() -> ModuleType:
    """setuptools.build_meta, once all tools are importable."""
    torch = apex_toolchain.check_environment()
    # Appended, so that what the front end installed for this build comes first.
    sys.path.extend(path for path in torch.search_path if path not in sys.path)
    importlib.invalidate_caches()
    installed = {}
    for name in apex_toolchain.BUILD_TOOLS:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    missing = apex_toolchain.missing_tools(installed)
    if missing:
        names = " ".join(f"'{requirement}'" for requirement in missing)
        raise apex_toolchain.BuildError(
            f"build tools are missing or too old: {', '.join(missing)}.",
            "Mend it with",
            f"  pip install {names}",
            "or leave out --no-build-isolation, and pip fetches them for this build.",
        )
    return importlib.import_module("setuptools.build_meta")


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    torch = apex_toolchain.check_environment()
    return [*apex_toolchain.missing_tools(torch.tools), *apex_nvcc.requirements(torch)]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return get_requires_for_build_wheel(config_settings)


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:
    # Packing the sources needs neither torch nor a compiler.
    return [apex_toolchain.BUILD_TOOLS["setuptools"]]


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Settings = None) -> str:
    return _setuptools().prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Settings = None) -> str:
    return _setuptools().prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    return _setuptools().build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    return _setuptools().build_editable(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    return importlib.import_module("setuptools.build_meta").build_sdist(sdist_directory, config_settings)
