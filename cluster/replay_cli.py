"""`millrace replay stats | export | import`: a running replay service, or a snapshot of one, from the command line."""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.runs import ADDRESSES, TOKEN, RunFolder

if TYPE_CHECKING:
    import pyarrow.flight as flight

    from replay.snapshot import Snapshot

TOKEN_VARIABLE = "MILLRACE_TOKEN"
MESSAGE_ROWS = 64  # a limiter lets a message in as a whole, and may leave little room
_SOURCE = "addresses of a service's shards (grpc://host:port,…), the folder of a run, or a snapshot (folder or URI)"


@dataclass(frozen=True)
class Service:
    """A running service: the addresses of its shards, and what it takes to be let in."""

    addresses: tuple[str, ...]
    token: str | None
    authority: str | None

    def connect(self, address: str) -> flight.FlightClient:
        import pyarrow.flight as flight

        from replay.security import Security, flight_client

        if self.token is None:
            return flight.FlightClient(address)
        return flight_client(address, Security(self.token, authority=self.authority))

    def ask(self, kind: str, body: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """The answers of all shards, in order."""
        from replay.wire import action

        answers = []
        for address in self.addresses:
            with self.connect(address) as client:
                answers.append(action(client, kind, body or {}))
        return answers


def main(words: Sequence[str]) -> int:
    """Run one of the commands. Returns its exit code.

    Raises:
        ValueError, FileNotFoundError: it was asked for something impossible.
        RuntimeError, OSError: it failed.
    """
    import pyarrow.flight as flight

    chosen = _parser().parse_args(words)
    try:
        found: dict[str, Any] = chosen.run(chosen)
    except flight.FlightError as error:
        raise RuntimeError(_first_line(error)) from error
    if chosen.json:
        print(json.dumps(found))
    else:
        print("\n".join(chosen.show(found)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="millrace replay", description="Look into, export and fill a replay service.")
    commands = parser.add_subparsers(required=True, metavar="stats | export | import")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="one line of JSON")
    common.add_argument(
        "--token-file", type=Path, help=f"file with the run's token (default: that of the run, or ${TOKEN_VARIABLE})"
    )
    common.add_argument("--authority", help="PEM file of the certificate to trust, where the service uses TLS")

    stats = commands.add_parser("stats", parents=[common], help="what a service or a snapshot holds")
    stats.add_argument("source", help=_SOURCE)
    stats.set_defaults(run=_stats, show=_show_stats)

    export = commands.add_parser("export", parents=[common], help="write the steps to a Parquet file, a row for each")
    export.add_argument("source", help=_SOURCE)
    export.add_argument("out", type=Path, metavar="OUT.parquet")
    export.add_argument(
        "--via", metavar="URI", help="place both the shards and this machine reach, where they are not on one host"
    )
    export.set_defaults(run=_export, show=_show_export)

    import_ = commands.add_parser("import", parents=[common], help="store episodes of other programs' files")
    import_.add_argument(
        "files", nargs="+", metavar="FILE", help="Parquet or Arrow in RLDS form, Minari HDF5, or a folder of them"
    )
    import_.add_argument(
        "--into", required=True, metavar="ADDRESS|RUN|SNAPSHOT", help="a running service, or a snapshot to add to"
    )
    import_.add_argument(
        "--map", action="append", default=[], metavar="THEIRS=OURS", help="a column's name, such as obs=observation"
    )
    import_.set_defaults(run=_import, show=_show_import)
    return parser


# --------------------------------------------------------------------- sources


def _service(text: str, chosen: argparse.Namespace) -> Service | None:
    """The service that a word on the command line names; None where it names something else."""
    run, authority = Path(text), chosen.authority
    if re.fullmatch(r"(grpc(\+tcp|\+tls)?://)?[^/,]+:\d+(,(grpc(\+tcp|\+tls)?://)?[^/,]+:\d+)*", text):
        addresses = [a if "://" in a else f"grpc://{a}" for a in text.split(",")]
    elif (run / "config.yaml").is_file() and (run / ADDRESSES).is_file():
        addresses = [str(a) for a in json.loads((run / ADDRESSES).read_text(encoding="utf-8"))["addresses"]]
        settings = RunFolder.open(run).config.replay
        authority = authority or settings.tls_authority or settings.tls_certificate
    else:
        return None
    file = chosen.token_file or (run / TOKEN if (run / TOKEN).is_file() else None)
    token = os.environ.get(TOKEN_VARIABLE) if file is None else file.read_text(encoding="utf-8").strip()
    return Service(tuple(addresses), token or None, authority)


def snapshots_of(text: str) -> list[Snapshot]:
    """The snapshot that a word names: its place, a checkpoint, or a run, whose newest checkpoint it is then.

    Raises:
        FileNotFoundError: there is none.
    """
    from replay.snapshot import SnapshotError, SnapshotStore

    path = Path(text)
    if (path / "config.yaml").is_file():
        from cluster.checkpoint import Checkpoints

        checkpoint = Checkpoints(path / "checkpoints").latest()
        if checkpoint is None:
            raise FileNotFoundError(f"{text} holds no whole checkpoint yet")
        path = checkpoint.path
        text = str(path)
    if (path / "replay").is_dir():
        text = str(path / "replay")
    elif "://" not in text and not path.exists():
        raise FileNotFoundError(f"{text} is no address, no run and no snapshot: it does not exist")
    store = SnapshotStore(text)
    if not store.shards():
        raise SnapshotError(f"{text} holds no snapshot: no shard-*/manifest-*.json in it")
    return store.all()


# -------------------------------------------------------------------- commands


def _stats(chosen: argparse.Namespace) -> dict[str, Any]:
    service = _service(chosen.source, chosen)
    if service is not None:
        answers = service.ask("stats")
        return {"source": chosen.source, "kind": "service", "shards": answers}
    shards = []
    for snapshot in snapshots_of(chosen.source):
        header = snapshot.header
        shards.append(
            {
                "shard": snapshot.shard,
                "steps": sum(snapshot.segments.column("rows").to_pylist()),
                "segments": snapshot.segments.num_rows,
                "files": len(snapshot.files),
                "bytes": snapshot.size,
                "manifest": snapshot.path_of(snapshot.name),
                **header["counters"],
                "tables": {name: table["counters"] for name, table in header["tables"].items()},
                "settings": header["settings"],
                "schema": [[f.name, f.dtype, list(f.shape)] for f in snapshot.schema.fields],
            }
        )
    return {"source": chosen.source, "kind": "snapshot", "shards": shards}


def _show_stats(found: dict[str, Any]) -> Iterator[str]:
    for number, shard in enumerate(found["shards"]):
        yield f"shard {shard.get('shard', number)}: {_numbers(shard)}"
        for name, table in shard.get("tables", {}).items():
            yield f"  table {name}: {_numbers(table)}"
        for line in shard.get("waiting", ()):
            yield f"  {line}"
    if found["kind"] == "snapshot":
        fields = found["shards"][0]["schema"]
        yield "fields: " + ", ".join(f"{name} {dtype}{shape or ''}" for name, dtype, shape in fields)


def _numbers(values: dict[str, Any]) -> str:
    shown = []
    for name, value in values.items():
        if isinstance(value, int | float) and name != "shard":
            shown.append(f"{name} {value}" if isinstance(value, int) else f"{name} {value:.4g}")
    return ", ".join(shown)


@contextmanager
def _held(source: str, chosen: argparse.Namespace) -> Iterator[list[Snapshot]]:
    """The snapshots of a source; those of a running service are made now, and removed afterwards."""
    from replay.snapshot import SnapshotStore

    service = _service(source, chosen)
    if service is None:
        yield snapshots_of(source)
    elif chosen.via is not None:
        service.ask("snapshot", {"location": chosen.via})
        yield SnapshotStore(chosen.via).all()
    else:
        with tempfile.TemporaryDirectory(prefix="millrace-export-") as folder:
            service.ask("snapshot", {"location": folder})
            found = SnapshotStore(folder)
            if len(found.shards()) < len(service.addresses):
                raise RuntimeError("a shard runs on another host; name a place that all reach by --via URI")
            yield found.all()


def _export(chosen: argparse.Namespace) -> dict[str, Any]:
    from replay.export import export_parquet

    with _held(chosen.source, chosen) as snapshots:
        done = export_parquet(snapshots, chosen.out)
    return {
        "path": str(done.path),
        "steps": done.steps,
        "episodes": done.episodes,
        "bytes": done.path.stat().st_size,
    }


def _show_export(found: dict[str, Any]) -> Iterator[str]:
    size = found["bytes"] / 1e6
    yield f"{found['path']}: {found['steps']} steps of {found['episodes']} episodes, {size:.1f} MB"


def _import(chosen: argparse.Namespace) -> dict[str, Any]:
    from replay.datasets import files_of, infer_schema, read_chunks
    from replay.imports import import_into_service, import_into_snapshot
    from replay.schema import StepSchema
    from replay.snapshot import SnapshotStore
    from replay.writers import FlightWriter

    mapped = dict(_pair(text) for text in chosen.map)
    files = files_of(chosen.files)
    if (Path(chosen.into) / "config.yaml").is_file():
        raise ValueError(
            f"{chosen.into} is a training run, whose steps decide its updates and its end: imported ones would count as its "
            "own. Import into a snapshot or into a service of its own, and mix both (replay.mixing); name the shards' addresses "
            "where you want it all the same"
        )
    service = _service(chosen.into, chosen)
    if service is not None:
        schema = StepSchema.from_json(service.ask("describe")[0]["schema"])
        chunks = read_chunks(files, schema, mapped)
        connect = partial(FlightWriter, schema=schema, message_rows=MESSAGE_ROWS, connect=service.connect)
        done = import_into_service(chunks, [connect(address) for address in service.addresses])
        return {"into": chosen.into, "kind": "service", **vars(done)}
    store = SnapshotStore(chosen.into)
    there = store.latest(shards[0]) if (shards := store.shards()) else None
    schema = infer_schema(files[0], mapped) if there is None else there.schema
    done, snapshot = import_into_snapshot(read_chunks(files, schema, mapped), schema, store)
    return {"into": chosen.into, "kind": "snapshot", "shard": snapshot.shard, "bytes": snapshot.size, **vars(done)}


def _show_import(found: dict[str, Any]) -> Iterator[str]:
    where = f"{found['into']}" + (f", shard {found['shard']}" if "shard" in found else "")
    yield f"{where}: {found['steps']} steps, {found['transitions']} transitions of {found['episodes']} episodes"


def _pair(text: str) -> tuple[str, str]:
    theirs, equals, ours = text.partition("=")
    if not (theirs and equals and ours):
        raise ValueError(f"--map expects THEIRS=OURS, such as obs=observation; received {text}")
    return theirs, ours


def _first_line(error: Exception) -> str:
    # Flight appends where in gRPC an error came from.
    return re.sub(r"\. (gRPC client debug context|Client context|Detail):.*", "", str(error).split("\n")[0])
