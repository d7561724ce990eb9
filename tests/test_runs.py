"""The folder of a run: settings and facts come back as they were written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cluster.runs
from cluster.runs import RunFolder
from configs.schema import EnvSettings, ReplaySettings, RunConfig, SacSettings, StopSettings

CONFIG = RunConfig(
    seed=7,
    env=EnvSettings(id="my.package:make", kwargs={"size": 3, "fast": True, "name": "no: 1", "scale": 1e-7}),
    algorithm=SacSettings(hidden=(64, 32), policy_lr=1e-5, target_entropy=None),
    stop=StopSettings(steps=None, wall_s=12.5),
)


def test_a_run_is_opened_with_the_config_it_was_made_with(tmp_path: Path) -> None:
    run = RunFolder.create(CONFIG.model_copy(update={"root": str(tmp_path), "name": "first"}), ["millrace", "train"])
    assert run.path == tmp_path / "first"
    assert RunFolder.open(run.path).config == run.config
    assert run.config.algorithm.hidden == (64, 32)
    facts = run.facts()
    assert facts["seed"] == 7
    assert facts["command"] == ["millrace", "train"]
    assert facts["versions"]["numpy"] == np.__version__
    assert facts["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(facts["versions"]) == {"python", *cluster.runs.PACKAGES}
    assert facts["machine"]["cpus"] >= 1
    assert facts["machine"]["memory_bytes"] > 10**8


def test_a_run_without_a_name_gets_one(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"root": str(tmp_path)})
    names = [RunFolder.create(config, []).config.name for _ in range(2)]
    assert names[0] != names[1]
    for name in names:
        assert name is not None
        assert re.fullmatch(r"my\.package-make-sac-\d{8}-\d{6}(-\d)?", name)
        assert RunFolder.open(tmp_path / name).config.name == name


def test_an_existing_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"root": str(tmp_path), "name": "taken"})
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileExistsError, match=r"taken exists already; choose another --name.*--resume"):
        RunFolder.create(config, [])
    assert not list((tmp_path / "taken").iterdir())


def test_how_a_run_went_on_and_ended_is_kept(tmp_path: Path) -> None:
    run = RunFolder.create(CONFIG.model_copy(update={"root": str(tmp_path), "name": "x"}), ["a"])
    run.resumed(["b", "--resume"])
    run.finished({"steps": 10, "mean_return": float("nan")})
    facts = json.loads((run.path / "run.json").read_text())
    assert facts["command"] == ["a"]
    assert facts["resumed"][0]["command"] == ["b", "--resume"]
    assert facts["summary"] == {"steps": 10, "mean_return": None}
    assert facts["finished"] >= facts["started"]
    run.event("restart", "actor 2\ndied", time_s=1.5)
    run.event("warning", "…", time_s=None)
    lines = (run.path / "events.jsonl").read_text().splitlines()
    event = json.loads(lines[0])
    assert {key: event[key] for key in ("time_s", "kind", "text", "role", "id")} == {
        "time_s": 1.5, "kind": "restart", "text": "actor 2\ndied", "role": "actor", "id": "2",
    }  # fmt: skip
    assert json.loads(lines[1])["time_s"] is None


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no config\.yaml"):
        RunFolder.open(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: -1\n")
    with pytest.raises(ValueError, match=r"config\.yaml cannot be used"):
        RunFolder.open(tmp_path)


def test_the_commit_is_that_of_the_source_tree(tmp_path: Path) -> None:
    source = Path(cluster.runs.__file__)
    for name in ("runs.py", "files.py", "__init__.py"):
        (tmp_path / "tree" / "cluster").mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / "cluster" / name).write_bytes((source.parent / name).read_bytes())
    tree = tmp_path / "tree"

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tree, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def commit() -> str:
        # The repository's root stands behind the tree's, for configs/.
        path = f"import sys; sys.path[:0] = [{str(tree)!r}]; sys.path.append({str(source.parents[1])!r})"
        code = f"{path}; from cluster.runs import _commit; print(_commit())"
        done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    assert commit() == "None"
    git("add", "-A")
    git("commit", "-q", "-m", "first")
    head = git("rev-parse", "HEAD")
    assert commit() == head
    with (tree / "cluster" / "files.py").open("a") as file:
        file.write("# changed\n")
    assert commit() == f"{head}-dirty"


def test_a_token_is_made_once_per_run_and_is_nobody_elses_to_read(tmp_path: Path) -> None:
    config = RunConfig(root=str(tmp_path), replay=ReplaySettings(tls_certificate="a.pem", tls_key="a.key"))
    one = RunFolder.create(config.model_copy(update={"name": "one"}), ["test"])
    two = RunFolder.create(config.model_copy(update={"name": "two"}), ["test"])
    security = one.security()
    assert (security.certificate, security.key) == ("a.pem", "a.key")
    assert (one.path / "token").stat().st_mode & 0o777 == 0o600
    assert len(security.token) > 40
    assert security.token == RunFolder.open(one.path).security().token != two.security().token
    assert all(security.token not in (one.path / name).read_text() for name in ("config.yaml", "run.json"))
    assert security.token not in repr(security)

    (one.path / "token").unlink()  # a run of an earlier version had none
    assert one.security().token not in ("", security.token)
    (one.path / "token").write_text("two words")
    with pytest.raises(ValueError, match=r"token cannot be used .*; remove it"):
        one.security()
