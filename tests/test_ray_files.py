"""Checkpoint files of processes on nodes that do not see the run's folder: through the head, as if they saw it."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import ray_files
from cluster.checkpoint import Checkpoints, load_tensors, save_tensors
from cluster.ray_files import SERVED, FolderMark, RunFiles, ServedFolder
from replay.snapshot import SnapshotError, SnapshotStore
from tests.runs_for_tests import ROOT
from tests.test_replay_snapshot import Segments


class Far:
    """A process on another node, and the head that it asks, in this one; it counts what it asks for."""

    def __init__(self, run: Path) -> None:
        self.folder = run / SERVED
        self.folder.mkdir(parents=True, exist_ok=True)
        self.mark = FolderMark.leave(run, afresh=True)
        self.head = ServedFolder(self.folder)
        self.asked: Counter[str] = Counter()
        self.sent_bytes = 0
        self.files = RunFiles(FolderMark(self.mark.folder, "of another folder at the same path"), ask=self.ask)

    def ask(self, operation: str, *arguments: Any) -> Any:
        self.asked[operation] += 1
        if operation == "write":
            self.sent_bytes += len(arguments[2])
        return self.head.do(operation, *arguments)


@pytest.fixture
def far(tmp_path: Path) -> Far:
    return Far(tmp_path / "run")


def filled(steps: int) -> Segments:
    source = Segments()
    for lane in range(3):
        source.write(lane, steps)
    return source


def rows_of(store: SnapshotStore) -> list[bytes]:
    snapshot = store.latest(0)
    assert snapshot is not None
    snapshot.verify()
    return [segment.rows.tobytes() for segment in snapshot.copies() if segment.rows is not None]


def test_who_sees_the_folder_does_not_ask_the_head(far: Far) -> None:
    files = RunFiles(far.mark, ask=far.ask)
    files.store(far.folder / "a" / "replay").save(filled(10))
    with files.writing(far.folder / "a" / "learner.safetensors") as path:
        assert path == far.folder / "a" / "learner.safetensors"
    with files.reading(far.folder / "a") as path:
        assert path == far.folder / "a"
    assert not far.asked


def test_a_copy_of_the_folder_or_one_of_an_earlier_run_is_not_taken_for_it(far: Far, tmp_path: Path) -> None:
    assert far.mark.is_here()
    before = tmp_path / "before"
    shutil.copytree(far.mark.folder, before)
    assert FolderMark.leave(Path(far.mark.folder), afresh=False) == far.mark  # a head that was started again
    again = FolderMark.leave(Path(far.mark.folder), afresh=True)
    assert not far.mark.is_here()
    assert again.is_here()
    assert not FolderMark(str(before), again.text).is_here()
    assert not FolderMark(str(tmp_path / "nowhere"), again.text).is_here()


@settings(max_examples=10)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 20)), min_size=1, max_size=4))
def test_snapshots_are_what_they_would_be_on_the_spot(growth: list[tuple[int, int]]) -> None:
    with TemporaryDirectory() as folder:
        far, before = Far(Path(folder) / "run"), None
        source = Segments()
        for number, (lane, steps) in enumerate(growth):
            source.write(lane, steps)
            replay = far.folder / f"step_{number}" / "replay"
            far.files.store(replay).save(source, previous=None if before is None else far.files.store(before))
            SnapshotStore(Path(folder) / f"plain-{number}").save(source)
            expected = rows_of(SnapshotStore(Path(folder) / f"plain-{number}"))
            assert (
                sorted(rows_of(SnapshotStore(replay))) == sorted(rows_of(far.files.store(replay))) == sorted(expected)
            )
            before = replay


def test_what_the_checkpoint_before_holds_is_linked_by_the_head_and_not_sent_again(far: Far) -> None:
    source, first, second = filled(200), far.folder / "one" / "replay", far.folder / "two" / "replay"
    far.files.store(first).save(source)
    sent, far.sent_bytes = far.sent_bytes, 0
    source.write(0, 3)
    far.files.store(second).save(source, previous=far.files.store(first))
    assert far.asked["link"] == 1
    assert far.sent_bytes < 0.6 * sent
    (linked,) = (path for path in second.rglob("rows-*") if path.stat().st_nlink == 2)
    assert linked.samefile(first / "shard-0" / linked.name)
    shutil.rmtree(first)  # as when the older one is pruned
    assert len(rows_of(SnapshotStore(second))) == len(source.filled)


def test_a_full_disk_of_the_head_is_an_error_of_who_saves(far: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = os.pwrite, 4000

    def full(descriptor: int, data: Any, offset: int) -> int:
        nonlocal left
        left -= len(data)
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left") as caught:
        far.files.store(far.folder / "a" / "replay").save(filled(100))
    assert caught.value.errno == errno.ENOSPC
    left = 1 << 30
    assert [path.name for path in far.folder.rglob("*") if path.is_file()] == []


def test_a_whole_checkpoint_is_written_from_afar(far: Far) -> None:
    """A learner's file and the shards' rows, in the folder in which a checkpoint is being written."""
    source, weights = filled(50), {"w": np.arange(6.0)}
    checkpoints = Checkpoints(far.folder)
    with checkpoints.write(env_steps=1, updates=2) as folder:
        with far.files.writing(folder / "learner.safetensors") as path:
            assert not path.is_relative_to(far.folder)
            save_tensors(path, weights, {"updates": 2})
            assert not (folder / "learner.safetensors").exists()
        with far.files.writing(folder / "replay") as path:  # a folder to which several add their files
            path.mkdir()
            (path / "queue-0.arrow").write_bytes(b"0" * 10)
            (path / "queue-1.arrow").write_bytes(b"1" * 10)
        far.files.store(folder / "replay").save(source, shard=3)
    checkpoint = checkpoints.latest()  # all checksums are right
    assert checkpoint is not None
    assert not [file.path for file in checkpoint.files if ".part" in file.path or file.path.startswith(".")]
    with far.files.reading(checkpoint.path / "learner.safetensors") as path:
        assert load_tensors(path)[0]["w"].tolist() == weights["w"].tolist()
    assert not path.exists()
    with far.files.reading(checkpoint.path / "replay") as path:
        assert sorted(file.name for file in path.iterdir()) == ["queue-0.arrow", "queue-1.arrow", "shard-3"]
        assert (path / "queue-1.arrow").read_bytes() == b"1" * 10
        SnapshotStore(path).all()[0].verify()


def test_a_failed_write_sends_nothing(far: Far) -> None:
    def fail() -> None:
        with far.files.writing(far.folder / "a" / "learner") as path:
            path.write_bytes(b"half")
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        fail()
    assert not far.asked


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 100])
def test_files_go_in_parts_of_any_size(far: Far, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_files, "CHUNK_BYTES", 16)
    data = os.urandom(size)
    with far.files.writing(far.folder / "a" / "b") as path:
        path.write_bytes(data)
    assert (far.folder / "a" / "b").read_bytes() == data
    with far.files.reading(far.folder / "a" / "b") as path:
        assert path.read_bytes() == data
    with far.files.store(far.folder / "a").filesystem.open_input_file("a/b") as file:
        assert file.size() == size
        assert file.read_at(20, 10) == data[10:30]
        file.seek(min(5, size))
        assert file.read() == data[5:]


def test_a_file_that_shrinks_while_it_is_read_is_an_error(far: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    (far.folder / "a").write_bytes(b"123456")
    monkeypatch.setattr(far.head, "read", lambda path, offset, size: b"")
    with (
        pytest.raises(OSError, match="expected 6 bytes, and the file ends after 0"),
        far.files.reading(far.folder / "a"),
    ):
        pass


def test_a_missing_snapshot_says_so(far: Far) -> None:
    assert far.files.store(far.folder / "nothing").latest(0) is None
    with pytest.raises(SnapshotError, match="holds no snapshot"):
        far.files.store(far.folder / "nothing").all()


@pytest.mark.parametrize(
    "path", ["../token", "a/../../token", "/etc/passwd", "out/token", "../checkpoints-of-another/x"]
)
@pytest.mark.parametrize("operation", ["info", "read", "write", "delete", "make_folder", "finish"])
def test_no_path_leads_out_of_the_folder(far: Far, path: str, operation: str) -> None:
    token = Path(far.mark.folder) / "token"
    token.write_text("secret")
    (far.folder / "out").symlink_to(far.mark.folder)
    arguments: dict[str, tuple[Any, ...]] = {"read": (0, 100), "write": (0, b"mine")}
    with pytest.raises(PermissionError, match="expected a path below"):
        far.head.do(operation, path, *arguments.get(operation, ()))
    for operation in ("move", "link"):
        (far.folder / "mine").write_text("mine")
        for pair in ((path, "mine"), ("mine", path)):
            with pytest.raises(PermissionError):
                far.head.do(operation, *pair)
    assert token.read_text() == "secret"
    with pytest.raises(ValueError, match="expected one of info, "):
        far.head.do("do", "info", "a")


def test_what_is_asked_twice_is_done_once(far: Far) -> None:
    """A head that is started again is asked again what the dead one may have done."""
    for _ in range(2):
        far.head.do("make_folder", "a")
    far.head.do("write", "a/b", 0, b"what an earlier try has left")
    for _ in range(2):
        far.head.do("write", "a/b", 0, b"1234")
    for _ in range(2):
        far.head.do("write", "a/b", 4, b"56")
    for _ in range(2):
        far.head.do("link", "a/b", "a/c")
    for _ in range(2):
        far.head.do("move", "a/b", "a/d")
    assert (far.folder / "a" / "d").read_bytes() == (far.folder / "a" / "c").read_bytes() == b"123456"
    for _ in range(2):
        far.head.do("delete", "a/c")
    assert [path.name for path in (far.folder / "a").iterdir()] == ["d"]


SCRIPT = """if True:
    import errno, os, sys, ray
    from pathlib import Path
    from cluster.ray_files import FILES_GROUP, SERVED, FolderMark, RunFiles, ServedFolder
    from replay.snapshot import SnapshotStore
    from tests.test_ray_files import filled, rows_of

    run = Path(sys.argv[1])
    (run / SERVED).mkdir(parents=True)
    ray.init(address="local", num_cpus=1, namespace="a", include_dashboard=False, logging_level="error")

    class Base:
        def __init__(self, run):
            self._served = ServedFolder(Path(run) / SERVED)

        @ray.method(concurrency_group="files")
        def files(self, operation, *arguments):
            if arguments[0] == "broken":
                raise OSError(errno.ENOSPC, "No space left on device", "broken")
            return self._served.do(operation, *arguments)

    @ray.remote(concurrency_groups=FILES_GROUP)
    class Head(Base):
        def save(self, worker, replay):  # blocks a thread of the head while files come in
            return ray.get(worker.save.remote(replay), timeout=60)

    @ray.remote(num_cpus=0)
    class Worker:
        def __init__(self, mark):
            self._files = RunFiles(mark)

        def save(self, replay):
            return self._files.store(replay).save(filled(50)).size

        def broken(self, path):
            with self._files.writing(path) as here:
                here.write_bytes(b"1")

    head = Head.options(name="head", max_concurrency=2, num_cpus=0).remote(str(run))
    worker = Worker.remote(FolderMark(str(run), "none"))
    replay = run / SERVED / "replay"
    size = ray.get(head.save.remote(worker, str(replay)), timeout=100)
    assert size == sum(path.stat().st_size for path in replay.rglob("*.arrow")), size
    rows_of(SnapshotStore(replay))
    try:
        ray.get(worker.broken.remote(str(run / SERVED / "broken")))
    except ray.exceptions.RayTaskError as error:
        assert error.cause.errno == errno.ENOSPC, error
    ray.kill(head)
    try:
        ray.get(worker.save.remote(str(replay)))
    except ray.exceptions.RayTaskError as error:
        assert isinstance(error.cause, OSError), error
        print("is gone" in str(error))
"""


def test_under_ray_with_a_head_that_waits_for_the_save(tmp_path: Path) -> None:
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "run")],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1:] == ["True"]
