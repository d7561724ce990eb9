"""Metrics of a run: every row written is read back, whatever happened between."""

from __future__ import annotations

import math
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.metrics import MetricsWriter, read_metrics


def test_rows_come_back_in_order_with_missing_values_as_null(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, rows_per_part=2) as writer:
        writer.write({"time_s": 1, "env_steps": 10})
        writer.write({"time_s": 2, "env_steps": 20, "loss/critic": 0.5})
        writer.write({"time_s": 3, "env_steps": 30, "loss/critic": math.nan, "eval/mean_return": None})
    rows = read_metrics(tmp_path).to_pylist()
    assert [row["time_s"] for row in rows] == [1.0, 2.0, 3.0]
    assert [row["env_steps"] for row in rows] == [10.0, 20.0, 30.0]
    assert rows[0]["loss/critic"] is None
    assert rows[1]["loss/critic"] == 0.5
    assert math.isnan(rows[2]["loss/critic"])
    assert rows[2]["eval/mean_return"] is None


def test_closing_merges_parts_and_a_resumed_run_appends(tmp_path: Path) -> None:
    for start in (0, 5, 10):
        with MetricsWriter(tmp_path, rows_per_part=2) as writer:
            for index in range(start, start + 5):
                writer.write({"env_steps": index, f"from_{start}": 1.0})
    files = sorted(path.name for path in (tmp_path / "metrics").glob("*.parquet"))
    assert files == ["part-000001-000009.parquet"]
    table = read_metrics(tmp_path)
    assert table["env_steps"].to_pylist() == [float(index) for index in range(15)]
    assert table["from_5"].to_pylist() == [None] * 5 + [1.0] * 5 + [None] * 5


def test_a_long_run_merges_parts_before_it_is_closed(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, rows_per_part=1)
    for index in range(205):
        writer.write({"env_steps": index})
    assert len(list((tmp_path / "metrics").glob("*.parquet"))) == 7
    assert read_metrics(tmp_path)["env_steps"].to_pylist() == [float(index) for index in range(205)]
    writer.close()


def test_rows_are_on_disk_after_the_time_given_and_lost_rows_end_there(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, rows_per_part=1000, seconds_per_part=0.0)
    writer.write({"env_steps": 1})
    assert read_metrics(tmp_path)["env_steps"].to_pylist() == [1.0]
    # The writer is dropped without close(), as a killed process does.
    del writer
    with MetricsWriter(tmp_path) as writer:
        writer.write({"env_steps": 2})
    assert read_metrics(tmp_path)["env_steps"].to_pylist() == [1.0, 2.0]


def test_a_damaged_part_is_named_left_out_and_kept(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, rows_per_part=1)
    for index in range(3):
        writer.write({"env_steps": index})
    damaged = tmp_path / "metrics" / "part-000002.parquet"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.warns(RuntimeWarning, match=r"part-000002\.parquet is damaged"):
        assert read_metrics(tmp_path)["env_steps"].to_pylist() == [0.0, 2.0]
    with pytest.warns(RuntimeWarning, match="damaged"):
        writer.close()
    assert damaged.exists()


def test_parts_already_merged_are_not_read_twice(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, rows_per_part=1)
    for index in range(3):
        writer.write({"env_steps": index})
    folder = tmp_path / "metrics"
    leftover = (folder / "part-000002.parquet").read_bytes()
    writer.close()
    # As if the process had died between writing the merged file and removing the parts.
    (folder / "part-000002.parquet").write_bytes(leftover)
    assert read_metrics(tmp_path)["env_steps"].to_pylist() == [0.0, 1.0, 2.0]
    with MetricsWriter(tmp_path) as writer:
        writer.write({"env_steps": 3})
    assert read_metrics(tmp_path)["env_steps"].to_pylist() == [0.0, 1.0, 2.0, 3.0]


def test_a_half_written_file_is_no_part_and_removed_by_the_next_writer(tmp_path: Path) -> None:
    folder = tmp_path / "metrics"
    folder.mkdir()
    (folder / ".part-000001.parquet.99.tmp").write_bytes(b"PAR1 and then the power went")
    assert read_metrics(tmp_path).num_rows == 0
    MetricsWriter(tmp_path).close()
    assert not list(folder.glob(".part*"))


def test_tensorboard_events_have_env_steps_as_step(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write({"env_steps": 128, "loss/critic": 0.25, "q/mean": None, "entropy": math.nan})
    assert (128, "loss/critic", 0.25) in _scalars(tmp_path)
    assert {tag for _, tag, _ in _scalars(tmp_path)} == {"env_steps", "loss/critic"}


def test_a_value_that_is_no_number_is_named(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match=r"'loss/critic' must be a number.*'high'"):
        writer.write({"loss/critic": "high"})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="closed"):
        writer.write({"env_steps": 1})


def test_writing_metrics_does_not_import_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from cluster.metrics import MetricsWriter\n"
        f"with MetricsWriter(Path({str(tmp_path)!r})) as writer: writer.write({{'env_steps': 1.0}})\n"
        "assert 'tensorboardX' in sys.modules\n"
        "assert not {'torch', 'ray'} & set(sys.modules), 'imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _scalars(run_folder: Path) -> set[tuple[int, str, float]]:
    from tensorboardX.proto.event_pb2 import Event

    scalars = set()
    for path in (run_folder / "metrics" / "tensorboard").iterdir():
        data, at = path.read_bytes(), 0
        while at < len(data):
            # A record: length, its checksum, the event, its checksum.
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            scalars |= {(event.step, value.tag, value.simple_value) for value in event.summary.value}
    return scalars


def test_a_full_disk_ends_the_events_and_only_delays_the_rows(tmp_path: Path) -> None:
    """On a disk of 256 kB, in a mount namespace of its own: nothing blocks, and no row is lost once there is room."""
    code = f"""
from pathlib import Path
from cluster.files import DiskFullError
from cluster.metrics import MetricsWriter, read_metrics
folder = Path({str(tmp_path)!r})
writer, told = MetricsWriter(folder, rows_per_part=16), []
for step in range(400):
    try:
        writer.write({{"env_steps": step}} | {{f"k{{n}}": float(step * n) for n in range(30)}})
    except DiskFullError as error:
        told.append(str(error))
assert "TensorBoard events end here" in told[0], told[0]
assert "metrics go on once there is room" in told[-1], told[-1]
for events in (folder / "metrics" / "tensorboard").iterdir():
    events.unlink()
writer.close()
assert read_metrics(folder)["env_steps"].to_pylist() == list(range(400))
"""
    unshare = shutil.which("unshare")
    mount = ["sh", "-c", f'mount -t tmpfs -o size=256k none "{tmp_path}" && exec "$0" -c "$1"', sys.executable, code]
    if unshare is None or subprocess.run([unshare, "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system allows no mount namespace")
    root = Path(__file__).parents[1]
    done = subprocess.run([unshare, "-rm", *mount], cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
