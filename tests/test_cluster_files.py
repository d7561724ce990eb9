"""The cluster files: Ray takes them, they agree with each other and with this checkout; and what cluster/train.py says."""

from __future__ import annotations

import copy
import fnmatch
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]
LAUNCHED = ("local", "aws", "gcp")  # by `ray up`
RENTED = ("aws", "gcp")
CUT_S = 20.0  # for which a network may be cut without a node being given up


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / f"{name}.yaml").read_text())
    return found


def checked(config: dict[str, Any]) -> dict[str, Any]:
    """A cluster as Ray reads it.

    Raises:
        jsonschema.ValidationError: Ray refuses it.
    """
    full: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(full)
    return full


def pods() -> dict[str, dict[str, Any]]:
    """Groups of kuberay.yaml by name."""
    spec = read("kuberay")["spec"]
    return {"head": spec["headGroupSpec"], **{group["groupName"]: group for group in spec["workerGroupSpecs"]}}


def container(group: dict[str, Any]) -> dict[str, Any]:
    (found,) = group["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def start(config: dict[str, Any], kind: str) -> str:
    """The command that starts Ray on the head, or on a worker; what ends an old one comes before it."""
    stop, command = config[f"{kind}_start_ray_commands"]
    assert stop == "ray stop"
    assert isinstance(command, str)
    return command


def flags(command: str) -> dict[str, str]:
    """Flags of `ray start` in a start command."""
    words = shlex.split(command[command.index("ray start") :])
    return {name[2:]: value for name, _, value in (word.partition("=") for word in words if word.startswith("--"))}


def environment(command: str) -> dict[str, str]:
    return dict(re.findall(r"\b(RAY_\w+)=(\w+)", command))


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_takes_the_files_that_it_launches(name: str) -> None:
    assert checked(read(name))["max_workers"] > 0
    with pytest.raises(Exception, match="'worker_start_commands' was unexpected"):
        checked(read(name) | {"worker_start_commands": []})


def test_ray_takes_the_file_that_kuberay_launches() -> None:
    cluster = read("kuberay")
    found = _derive_autoscaling_config_from_ray_cr(cluster)
    kinds = found["available_node_types"]
    assert found["max_workers"] == sum(group["maxReplicas"] for group in cluster["spec"]["workerGroupSpecs"])
    for name, group in pods().items():
        seen = kinds["headgroup" if name == "head" else name]["resources"]
        limits = container(group)["resources"]["limits"]
        assert container(group)["resources"]["requests"] == limits
        assert seen["CPU"] == int(limits["cpu"])
        assert seen.get("GPU", 0) == limits.get("nvidia.com/gpu", 0)
    del cluster["spec"]["workerGroupSpecs"][0]["maxReplicas"]
    with pytest.raises(KeyError):
        _derive_autoscaling_config_from_ray_cr(cluster)


def node_types(name: str) -> dict[str, dict[str, Any]]:
    """(most nodes, resources) of each kind of node of a cluster that scales."""
    if name == "kuberay":
        found = _derive_autoscaling_config_from_ray_cr(read(name))["available_node_types"]
        return {"head" if kind == "headgroup" else kind: values for kind, values in found.items()}
    types: dict[str, dict[str, Any]] = checked(read(name))["available_node_types"]
    return types


@pytest.mark.parametrize("name", [*RENTED, "kuberay"])
def test_actors_scale_on_cpus_and_learners_have_gpus(name: str) -> None:
    types = node_types(name)
    assert types.keys() == {"head", "actors", "learners"}
    assert "GPU" not in types["actors"]["resources"]
    assert types["learners"]["resources"]["GPU"] > 0
    for kind in ("actors", "learners"):
        assert types[kind]["min_workers"] < types[kind]["max_workers"]
    # The same names of custom resources everywhere, so that a run's settings fit all of these clusters.
    custom = {kind: types[kind]["resources"].keys() & {"spot", "steady"} for kind in types}
    assert custom == {"head": {"steady"}, "actors": {"spot"}, "learners": {"steady"}}


def test_start_commands_are_the_same_everywhere() -> None:
    local = read("local")
    for name in RENTED:
        other = read(name)
        assert start(other, "worker") == start(local, "worker")
        assert start(other, "head") == start(local, "head").replace("export RAY_enable_autoscaler_v2=0; ", "")
        assert other["file_mounts"] == local["file_mounts"]
        assert other["setup_commands"] == local["setup_commands"]
    for kind in ("head", "worker"):
        wanted = flags(start(local, kind))
        names = ("object-manager-port", "node-manager-port", "object-store-memory")
        for name, group in pods().items():
            if (name == "head") == (kind == "head"):
                assert {n: group["rayStartParams"][n] for n in names} == {n: wanted[n] for n in names}
    ours = {item["name"]: item["value"] for item in container(pods()["head"])["env"]}
    assert ours.items() >= {k: v for k, v in environment(start(local, "head")).items() if "health" in k}.items()
    assert "RAY_JOB_STOP_WAIT_TIME_S" in ours


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_network_cut_for_a_while_loses_no_node(name: str) -> None:
    """Checks may fail at once, as where there is no route, so that the time between them is all that counts."""
    health = environment(start(read(name), "head"))
    period_s = int(health["RAY_health_check_period_ms"]) / 1000
    assert (int(health["RAY_health_check_failure_threshold"]) - 1) * period_s > CUT_S


@pytest.mark.parametrize("name", LAUNCHED)
def test_every_node_gets_the_packages_and_the_token(name: str) -> None:
    config = read(name)
    mounts = config["file_mounts"]
    assert mounts["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("RAY_AUTH_MODE=token" in command for command in config["setup_commands"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {package.partition(".")[0] for package in project["tool"]["setuptools"]["packages"]}
    files = {"Makefile", "pyproject.toml", "constraints.txt", project["project"]["readme"]}
    files |= set(project["project"]["license-files"])
    ours = {there: here for there, here in mounts.items() if there.startswith("~/millrace/")}
    assert set(ours.values()) == packages | files  # so neither .git, nor .venv, nor runs/
    assert all(there == f"~/millrace/{here}" and (ROOT / here).exists() for there, here in ours.items())
    assert any(fnmatch.fnmatch("__pycache__", pattern) for pattern in config["rsync_exclude"])


def test_every_node_has_what_it_takes_to_install(tmp_path: Path) -> None:
    """make agrees to install from what is mounted, and installs torch for where it is."""
    config = read("local")
    for there, here in config["file_mounts"].items():
        if there.startswith("~/millrace/") and (ROOT / here).is_file():
            shutil.copy(ROOT / here, tmp_path)
    command = config["setup_commands"][0].replace("~/millrace", str(tmp_path)).replace("make ", "make --dry-run ")
    said = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
    assert "-c constraints.txt -e ." in said
    assert ("download.pytorch.org/whl/cpu" in said) == (shutil.which("nvidia-smi") is None)


def test_without_a_token_no_cluster_starts(tmp_path: Path) -> None:
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "id_ed25519").touch()
    done = subprocess.run(
        [Path(sys.executable).with_name("ray"), "up", "-y", "cluster/local.yaml"],
        cwd=ROOT,
        env={"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "RAY_TMPDIR": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert done.stderr.endswith(f"No such file or directory: '{tmp_path}/.ray/auth_token'\n")


@pytest.fixture(scope="module")
def upload(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """What `ray job submit --working-dir .` uploads."""
    path = tmp_path_factory.mktemp("upload") / "working_dir.zip"
    excludes = get_runtime_env_default_excludes()
    create_package(str(ROOT), path, include_gitignore=True, include_parent_dir=False, excludes=excludes)
    return zipfile.ZipFile(path)


def test_a_job_uploads_little(upload: zipfile.ZipFile) -> None:
    names = upload.namelist()
    assert {"cluster/train.py", "configs/pendulum_sac.yaml", "configs/schema.py", "pyproject.toml"} <= set(names)
    tops = {name.partition("/")[0] for name in names}
    assert not tops & {".git", ".venv", "tests", "runs"}
    assert not [name for name in names if "__pycache__" in name or name.endswith((".png", ".so"))]
    assert sum(item.compress_size for item in upload.infolist()) < 4 * 2**20


def train(*words: str, script: Path, isolated: bool = False, home: Path) -> subprocess.CompletedProcess[str]:
    """Run the script as `ray submit` does, in the user's home folder."""
    options = ["-I", "-S"] if isolated else []
    return subprocess.run(
        [sys.executable, *options, str(script), *words],
        cwd=home,
        env={"HOME": str(home), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return Path(shutil.copy(ROOT / "cluster" / "train.py", tmp_path))


def test_train_says_that_millrace_is_missing(script: Path, tmp_path: Path) -> None:
    done = train("pendulum_sac", script=script, isolated=True, home=tmp_path)
    assert done.returncode == 1
    assert "cannot import Millrace" in done.stderr
    assert "`ray up`" in done.stderr
    assert "Traceback" not in done.stderr


def test_train_says_that_there_is_no_cluster(script: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    done = train("pendulum_sac", "--address", address, script=script, home=tmp_path)
    assert done.returncode == 1
    assert f"there is no Ray cluster to train on: looked on {socket.gethostname()} for {address}" in done.stderr
    assert "`ray up cluster/local.yaml`" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_train_takes_the_words_of_millrace_train(script: Path, tmp_path: Path) -> None:
    done = train("pendulum_sac", "--actor.count", "4", script=script, home=tmp_path)
    assert done.returncode == 2
    assert "actor.count: no such setting; did you mean actors.count?" in done.stderr
