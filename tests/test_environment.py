"""Locked packages and licences: `requirements/` holds what is needed and no more, each with hashes."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from checks import environment

SERVE, DEV = (environment.locked(environment.FOLDER / f"{name}.txt") for name in ("serve", "dev"))
pytestmark = pytest.mark.full  # a tool for developers


def test_a_server_has_the_packages_that_it_requires() -> None:
    """And none that only the package of the embedded model requires, or that nothing of it uses."""
    assert environment.serving() <= SERVE.keys()
    assert not {"scikit-learn", "scipy", "sentence-transformers", "websockets", "watchfiles"} & SERVE.keys()


def test_tests_have_the_further_packages_that_they_require() -> None:
    assert environment.developing() <= DEV.keys()


def test_versions_are_those_of_the_constraints() -> None:
    """No package is in both files, so that all of the constraints but torch are in one."""
    versions = {name: version for locked in (SERVE, DEV) for name, (version, _) in locked.items()}
    pins = environment.pins()
    assert pins.pop("torch")
    assert versions == pins
    assert len(versions) == len(SERVE) + len(DEV)


@pytest.mark.parametrize("name", [*SERVE, *DEV])
def test_every_package_has_hashes(name: str) -> None:
    _, hashes = {**SERVE, **DEV}[name]
    assert hashes


def package(folder: Path, **fields: str) -> metadata.Distribution:
    """A package with these lines of metadata."""
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    (folder / "METADATA").write_text("\n".join(["Metadata-Version: 2.4", "Name: x", *lines]))
    return metadata.PathDistribution(folder)


@pytest.mark.parametrize(
    ("fields", "licences"),
    [
        ({"License_Expression": "MPL-2.0 AND (Apache-2.0 OR MIT)"}, ["MPL-2.0", "Apache-2.0"]),
        ({"License_Expression": "GPL-3.0-only OR MIT"}, ["MIT"]),
        ({"License_Expression": "GPL-3.0-only"}, ["GPL-3.0-only"]),
        ({"License_Expression": "MIT AND LGPL-2.1"}, ["MIT", "LGPL-2.1"]),
        ({"License": "Copyright (c) X", "Classifier": "License :: OSI Approved :: BSD License"}, ["BSD-3-Clause"]),
        ({"Classifier": "License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)"}, ["MPL-2.0"]),
        ({"License": "Proprietary", "Classifier": "Topic :: X"}, ["Proprietary"]),
        ({}, [""]),
    ],
    ids=str,
)
def test_licences_of_a_package(tmp_path: Path, fields: dict[str, Any], licences: list[str]) -> None:
    assert environment.licences(package(tmp_path, **fields)) == {*licences}


def test_all_packages_have_licences_that_are_allowed() -> None:
    assert environment.refused() == []
