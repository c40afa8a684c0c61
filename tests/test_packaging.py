"""What a user installs: the wheel holds everything, and the pinned versions are complete and fit the bounds."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(*extras: str) -> list[Requirement]:
    names = list(PROJECT["dependencies"])
    for extra in extras:
        names += PROJECT["optional-dependencies"][extra]
    return [Requirement(name) for name in names]


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "tools/constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (path,) = directory.glob("*.whl")
    return path


def test_the_wheel_carries_the_configs_the_recipes_and_every_module(wheel):
    """A wheel without conf/ works in every checkout and nowhere else."""
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        str(path.relative_to(ROOT)) for path in (ROOT / "longlive").rglob("*.py") if "__pycache__" not in path.parts
    }
    for folder in ("conf", "recipes"):
        files = {f"longlive/{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob("*") if path.is_file()}
        assert files, f"{folder}/ is empty"
        expected |= files
    assert expected <= names, f"missing: {sorted(expected - names)}"
    assert not {name for name in names if name.split("/")[0] in ("tests", "tools", "runs")}


def test_an_unpacked_wheel_finds_and_composes_its_own_configs_from_anywhere(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    program = "from longlive.config import *; print(config_directory(), recipe_directory()); compose('train')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{site / 'longlive' / 'conf'} {site / 'longlive' / 'recipes'}\n"


def test_the_wheel_says_its_version_licence_and_command(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    text = archive.read(metadata).decode()
    version = re.search(r'__version__ = "(.+)"', (ROOT / "longlive/__init__.py").read_text())[1]
    assert f"\nVersion: {version}\n" in text
    assert "\nLicense-Expression: Apache-2.0\n" in text
    assert archive.read(metadata.replace("METADATA", "licenses/LICENSE")) == (ROOT / "LICENSE").read_bytes()
    assert b"longlive = longlive.cli:main" in archive.read(metadata.replace("METADATA", "entry_points.txt"))


def test_every_dependency_is_pinned_within_its_bounds():
    pinned = {canonicalize_name(name): Version(version) for name, version in pins().items()}
    for requirement in requirements("dev", "slurm"):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} has no pin in tools/constraints.txt"
        assert requirement.specifier.contains(pinned[name], prereleases=True), f"{requirement} excludes {pinned[name]}"


def test_pins_name_public_versions_and_no_package_host():
    """A pin like 2.13.0+cpu exists on one index only; a host in the file would be asked on every machine."""
    text = (ROOT / "tools/constraints.txt").read_text()
    assert pins()["torch"] == "2.13.0"
    assert not [version for version in pins().values() if Version(version).local]
    assert not re.search(r"https?:|--|\bfile:", text)


def imported_packages(path: Path) -> set[str]:
    """The first names of all absolute imports in a file, wherever in it they are."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def test_every_third_party_import_is_a_declared_dependency():
    """An import that only works because another package happens to bring it breaks with that package's next release."""
    distributions = {"PIL": "pillow", "hydra": "hydra-core", "transformer_engine": "transformer-engine"}
    declared = {canonicalize_name(requirement.name) for requirement in requirements("nvfp4", "slurm")}
    for path in (ROOT / "longlive").rglob("*.py"):
        for name in imported_packages(path):
            if name not in sys.stdlib_module_names and name not in ("longlive", "__future__"):
                assert canonicalize_name(distributions.get(name, name)) in declared, f"{path.relative_to(ROOT)}: {name}"


def test_the_tools_are_executable_bash_that_parses():
    for name in ("tools/setup", "tools/quickstart", "tools/test", ".ci/run"):
        path = ROOT / name
        assert path.read_text().startswith("#!/usr/bin/env bash\n")
        assert os.access(path, os.X_OK), f"{name} is not executable"
        subprocess.run(["bash", "-n", str(path)], check=True)


def test_setup_refuses_an_interpreter_that_is_none_of_the_supported(tmp_path):
    fake = tmp_path / "python3"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    copy = tmp_path / "checkout" / "tools" / "setup"
    copy.parent.mkdir(parents=True)
    copy.write_text((ROOT / "tools/setup").read_text())
    done = subprocess.run(
        ["bash", str(copy)], env=os.environ | {"PYTHON": str(fake)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"PYTHON={fake} is no Python 3.11, 3.12 or 3.13" in done.stderr
    assert not (tmp_path / "checkout" / ".venv").exists()
