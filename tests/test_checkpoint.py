"""Checkpoints: whole or absent, the right ones kept, damage found and named."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cluster.checkpoint import CheckpointError, Checkpoints, load_tensors, save_tensors, verify
from cluster.files import DiskFullError


def write(checkpoints: Checkpoints, step: int, mean_return: float | None = None, content: bytes = b"rows") -> None:
    with checkpoints.write(env_steps=step, updates=step // 2, eval_mean_return=mean_return) as folder:
        (folder / "head.json").write_text("{}")
        (folder / "replay").mkdir()
        (folder / "replay" / "shard-0.arrow").write_bytes(content)


def steps(checkpoints: Checkpoints) -> list[int]:
    return [checkpoint.env_steps for checkpoint in checkpoints.all()]


def test_a_checkpoint_is_described_by_its_manifest(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.latest() is None
    write(checkpoints, 12345, -150.5)
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.path == tmp_path / "checkpoints" / "step_000000012345"
    assert (latest.env_steps, latest.updates, latest.eval_mean_return) == (12345, 6172, -150.5)
    assert [(file.path, file.size) for file in latest.files] == [("head.json", 2), ("replay/shard-0.arrow", 4)]
    assert latest.size == 6


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, mean_return in ((100, -50.0), (200, 10.0), (300, float("nan")), (400, None), (500, 5.0), (600, -1.0)):
        write(checkpoints, step, mean_return)
    assert steps(checkpoints) == [200, 500, 600]
    best = checkpoints.best()
    assert best is not None
    assert best.env_steps == 200
    write(checkpoints, 700, 11.0)
    assert steps(checkpoints) == [600, 700]
    assert sorted(os.listdir(tmp_path)) == ["step_000000000600", "step_000000000700"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    write(checkpoints, 100, content=b"old")
    write(checkpoints, 100, content=b"newer")
    assert os.listdir(tmp_path) == ["step_000000000100"]
    latest = checkpoints.latest()
    assert latest is not None
    assert (latest.path / "replay" / "shard-0.arrow").read_bytes() == b"newer"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: (path / "replay/shard-0.arrow").write_bytes(b"rowz"), r"shard-0\.arrow has CRC-32"),
        (lambda path: (path / "replay/shard-0.arrow").write_bytes(b"row"), "has 3 bytes, its manifest says 4"),
        (lambda path: (path / "head.json").unlink(), r"head\.json cannot be read"),
        (lambda path: (path / "manifest.json").unlink(), r"has no manifest\.json"),
        (lambda path: (path / "manifest.json").write_text('{"format": 1, "env'), r"manifest\.json is damaged"),
        (lambda path: (path / "manifest.json").write_text('{"format": 9}'), "has format 9"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_and_named(tmp_path: Path, damage: object, words: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    write(checkpoints, 100)
    write(checkpoints, 200)
    assert callable(damage)
    damage(tmp_path / "step_000000000200")
    with pytest.warns(RuntimeWarning, match=words):
        latest = checkpoints.latest()
    assert latest is not None
    assert latest.env_steps == 100
    with pytest.raises(CheckpointError, match=words):
        verify(tmp_path / "step_000000000200")


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    write(checkpoints, 100)

    def fail() -> None:
        with checkpoints.write(env_steps=200, updates=1) as folder:
            (folder / "head.json").write_text("{}")
            raise RuntimeError("a shard is gone")

    with pytest.raises(RuntimeError, match="a shard is gone"):
        fail()
    assert os.listdir(tmp_path) == ["step_000000000100"]


def test_a_killed_write_is_no_checkpoint_and_is_cleaned_away(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from cluster.checkpoint import Checkpoints\n"
        f"with Checkpoints(Path({str(tmp_path)!r})).write(env_steps=100, updates=1) as folder:\n"
        "    (folder / 'head.json').write_text('{}'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False)
    assert os.listdir(tmp_path) == [".writing-step_000000000100"]
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() is None
    write(checkpoints, 100)
    assert os.listdir(tmp_path) == ["step_000000000100"]


def test_a_replacement_cut_short_gives_the_older_one_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    write(checkpoints, 100)
    (tmp_path / "step_000000000100").rename(tmp_path / ".replaced-step_000000000100")
    checkpoints.clean()
    assert steps(checkpoints) == [100]


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    write(checkpoints, 100)
    with (
        pytest.raises(
            DiskFullError, match=r"step_000000000200: .* free, 1000000\.0 TB needed; free some space"
        ) as error,
        checkpoints.write(env_steps=200, updates=1, needed_bytes=10**18),
    ):
        pytest.fail("the block must not run")
    assert error.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["step_000000000100"]


def test_a_disk_that_fills_up_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    # A file system of 1 MB, mounted in a namespace of its own.
    code = f"""
from pathlib import Path
import numpy as np
from cluster.checkpoint import Checkpoints, save_tensors
from cluster.files import DiskFullError
checkpoints = Checkpoints(Path({str(tmp_path)!r}) / "checkpoints")
def write(step, size):
    with checkpoints.write(env_steps=step, updates=1) as folder:
        save_tensors(folder / "learner.safetensors", {{"weight": np.zeros(size, np.uint8)}})
write(100, 400_000)
try:
    write(200, 900_000)
except DiskFullError as error:
    print(error)
print(sorted(path.name for path in checkpoints.folder.iterdir()), checkpoints.latest().env_steps)
write(300, 400_000)
print([checkpoint.env_steps for checkpoint in checkpoints.all()])
"""
    unshare = shutil.which("unshare")
    mount = ["sh", "-c", f'mount -t tmpfs -o size=1m none "{tmp_path}" && exec "$0" -c "$1"', sys.executable, code]
    if unshare is None or subprocess.run([unshare, "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system allows no mount namespace")
    root = Path(__file__).parents[1]
    done = subprocess.run([unshare, "-rm", *mount], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    message, left, after = done.stdout.splitlines()
    assert f"{tmp_path}/checkpoints/step_000000000200" in message
    assert "kB free" in message
    assert "needed" in message
    assert left == "['step_000000000100'] 100"
    assert after == "[100, 300]"


def test_tensors_come_back_exactly(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {
        "critic.weight": generator.normal(size=(2, 3, 4)).astype(np.float32).transpose(2, 0, 1),
        "log_temperature": np.array(-0.5, np.float32),
        "rng": generator.integers(0, 255, 5056, dtype=np.uint8),
        "updates": np.array([2**53 + 1], np.int64),
        "empty": np.empty((0, 3), np.float64),
    }
    path = tmp_path / "learner.safetensors"
    save_tensors(path, tensors, {"algorithm": "sac", "version": 12})
    loaded, metadata = load_tensors(path)
    assert metadata == {"algorithm": "sac", "version": 12}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        np.testing.assert_array_equal(loaded[name], tensor)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"learner\.safetensors cannot be loaded"):
        load_tensors(path)


def test_the_manifest_is_plain_json(tmp_path: Path) -> None:
    write(Checkpoints(tmp_path), 7, float("nan"))
    manifest = json.loads((tmp_path / "step_000000000007" / "manifest.json").read_text())
    assert manifest["eval_mean_return"] is None
    assert manifest["files"][0] == {"path": "head.json", "size": 2, "crc32": 2745614147}
