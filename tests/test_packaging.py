"""What pip, make and the wheel promise each other."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
PACKAGES = {p.parent.relative_to(ROOT).as_posix().replace("/", ".") for p in ROOT.glob("[a-z]*/**/__init__.py")}


def pins() -> dict[str, str]:
    """Versions in constraints.txt by canonical name."""
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def make(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {
        k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "ARGS", "PYTHON")
    }
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_constraints_pin_every_requirement_to_a_version_it_allows() -> None:
    pinned = pins()
    for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]:
        requirement = Requirement(text)
        version = pinned[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, f"{text} is pinned to {version}"


def test_constraints_hold_plain_versions_only() -> None:
    """A local version (2.13.0+cpu) or a path would bind everyone to one machine's build."""
    for name, version in pins().items():
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version), f"{name}=={version}"
    assert not {"millrace", "pip"} & pins().keys()
    assert not [name for name in pins() if name.startswith("nvidia-")], "torch names the CUDA libraries it needs itself"


def test_supported_python_and_torch() -> None:
    python = SpecifierSet(PROJECT["requires-python"])
    torch = next(Requirement(d).specifier for d in PROJECT["dependencies"] if Requirement(d).name == "torch")
    assert "3.10" not in python
    assert all(version in python for version in ("3.11", "3.12", "3.13"))
    assert all(f"Programming Language :: Python :: {version}" in PROJECT["classifiers"] for version in ("3.11", "3.13"))
    assert "2.10" not in torch
    assert all(version in torch for version in ("2.11", "2.13"))


def test_every_package_but_the_tests_is_installed() -> None:
    shipped = {name for name in PACKAGES if name.partition(".")[0] != "tests"}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == shipped


def test_the_millrace_command_exists() -> None:
    """The installed script and `pyproject.toml` name the same function."""
    script = Path(sys.executable).with_name("millrace")
    assert PROJECT["scripts"] == {"millrace": "cluster.cli:main"}
    result = subprocess.run([script, "--help"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "train" in result.stdout


def test_the_wheel_holds_the_packages_and_their_data_and_no_tests(tmp_path: Path) -> None:
    source = tmp_path / "source"
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info")
    packages = [name.replace(".", "/") for name in PYPROJECT["tool"]["setuptools"]["packages"]]
    for name in (*packages, "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=leave, dirs_exist_ok=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    result = subprocess.run([*command, tmp_path, source], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in packages
        for pattern in ("*.py", "*.yaml", "*.proto", "grafana.json")
        for path in (ROOT / package).glob(pattern)
    }
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.startswith("configs/") and name.endswith(".yaml") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_ci_runs_make_test_and_passes_its_exit_code_on(tmp_path: Path) -> None:
    run = ROOT / ".ci" / "run"
    assert os.access(run, os.X_OK)
    (tmp_path / ".ci").mkdir()
    copy = Path(shutil.copy(run, tmp_path / ".ci" / "run"))
    for code, recipe in ((0, "@echo tested"), (2, "@exit 3")):
        (tmp_path / "Makefile").write_text(f"test:\n\t{recipe}\n")
        result = subprocess.run([copy], cwd="/", capture_output=True, text=True, check=False)
        assert result.returncode == code
    assert "tested" not in result.stdout


def test_make_installs_once_and_again_only_when_pins_change(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    assert "pip" in make("-n", "demo", cwd=tmp_path).stdout
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for stamp in ("bin/pip", ".installed", ".installed-tests"):
        (tmp_path / ".venv" / stamp).touch()
    for target in ("demo", "test"):
        plan = make("-n", target, cwd=tmp_path).stdout
        assert "install" not in plan
        assert "venv --clear" not in plan
    later = (tmp_path / ".venv" / ".installed-tests").stat().st_mtime + 10
    os.utime(tmp_path / "constraints.txt", (later, later))
    assert "install -c constraints.txt -e .\n" in make("-n", "demo", cwd=tmp_path).stdout
    assert "install -c constraints.txt -e '.[test]'" in make("-n", "test", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            'case "$*" in -V) echo Python 3.9.1;; *) exit 1;; esac',
            "needs Python 3.11 or newer; '{python}' is Python 3.9.1",
        ),
        ('case "$*" in *ensurepip*) exit 1;; esac', "'{python}' lacks venv or ensurepip"),
    ],
)
def test_make_says_what_is_wrong_with_a_python(tmp_path: Path, script: str, message: str) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    result = make("demo", f"PYTHON={python}", cwd=tmp_path)
    assert result.returncode == 2
    assert message.format(python=python) in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_the_readme_names_only_make_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= named <= targets
