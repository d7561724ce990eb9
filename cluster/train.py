"""The script that `ray submit` and `ray job submit` run on a cluster: `millrace train`, attached to that cluster.

    ray submit cluster/local.yaml cluster/train.py -- CONFIG --actors.count 64
    ray job submit --working-dir . -- python cluster/train.py CONFIG --actors.count 64

It takes the words of `millrace train`, and adds what a cluster needs where they leave it out:

    --address   auto: the cluster of the node it runs on, or RAY_ADDRESS; it never starts a Ray of its own
    --root      ~/runs: the folder in which a job runs goes with the job
    --name      so that it can say at the start where the run's folder is
    --replay.host node, --control.host node   other nodes, which may join at any time, cannot reach what listens on loopback

Exit codes are those of `millrace train`.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
REACH_S = 5.0  # how long a cluster may take to accept a connection


class AttachError(RuntimeError):
    """This node is in no cluster that lets us in."""


@dataclass(frozen=True)
class Cluster:
    """What a cluster has, in its living nodes."""

    nodes: int
    cpus: float
    gpus: float


def main(words: Sequence[str]) -> int:
    """Train on the cluster. Returns the exit code."""
    if (HERE / "cli.py").exists():  # run from a checkout, whose modules Python would take for top-level ones
        sys.path[0] = str(HERE.parent)
    try:
        from cluster.cli import UsageError, split_words
        from cluster.cli import main as millrace
        from configs.load import ConfigError, load_run
    except ModuleNotFoundError as error:
        _say(f"{sys.executable} on {socket.gethostname()} cannot import Millrace: {error}")
        _say(
            "`ray submit` copies this script alone; file_mounts and setup_commands of the cluster's YAML install Millrace on every "
            "node. Run `ray up` with that YAML again, from the checkout, and read what its setup commands say"
        )
        return 1
    try:
        split = split_words(words, valued=["--resume"], bare=["--json", "--help", "-h"])
        resume = split.options.get("--resume")
        folder = None if resume is None else Path.home() / Path(resume).expanduser()
        config = load_run(split.config if folder is None else folder / "config.yaml", split.settings)
    except (UsageError, ConfigError):
        return millrace(["train", *words])  # it says what is wrong
    if {"--help", "-h"} & split.options.keys():
        return millrace(["train", *words])

    address = config.address or "auto"
    try:
        cluster = attach(address)
    except AttachError as error:
        _say(str(error))
        return 1
    more = ["--address", address]
    if folder is None:
        name = config.name or f"{Path(split.config or config.kind).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        root = Path(config.root).expanduser() if "root" in config.model_fields_set else Path.home() / "runs"
        folder = root.absolute() / name
        more += ["--root", str(folder.parent), "--name", folder.name]
    _say(f"attached to a cluster of {cluster.nodes} nodes with {cluster.cpus:g} CPUs and {cluster.gpus:g} GPUs")
    services = {"replay.host": config.replay, "control.host": config.control}
    for path in [path for path, settings in services.items() if "host" not in settings.model_fields_set]:
        more += [f"--{path}", "node"]
        _say(f"--{path} node: so that nodes which join later reach it too; keep the cluster on a network you trust")
    _say(f"the run's folder is {folder} on {socket.gethostname()}")
    _say(f"  how it goes:  ray exec CLUSTER.yaml 'millrace status {folder}'")
    _say(f"  its report:   ray rsync-down CLUSTER.yaml {folder}/report.html .")
    config_word = [] if split.config is None else [split.config]
    resume_words = [] if resume is None else ["--resume", str(folder)]
    as_json = ["--json"] if "--json" in split.options else []
    return millrace(["train", *config_word, *resume_words, *as_json, *split.settings, *more])


def attach(address: str) -> Cluster:
    """Look at the cluster at `address`: host:port, or auto for RAY_ADDRESS or else the cluster of this node.

    Raises:
        AttachError: there is none, or it does not let us in; the message says what was looked for and what to do.
    """
    from cluster.auth import show_token

    show_token()
    import ray

    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or address
    try:
        _reach(address)
        ray.init(address=address, log_to_driver=False, logging_level="error")
    except ray.exceptions.AuthenticationError:
        raise AttachError(_token_wanted(address)) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise AttachError(_unreached(address, error)) from None
    try:
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    finally:
        ray.shutdown()
    return Cluster(len(alive), sum(node.get("CPU", 0.0) for node in alive), sum(node.get("GPU", 0.0) for node in alive))


def _unreached(address: str, error: Exception) -> str:
    """Why there is no connection. Ray says the same of a dead cluster and of a wrong token."""
    found = re.search(r"[^\s/]+:\d+", str(error) if address == "auto" else address)
    if found is not None:
        try:
            _reach(found[0])
        except OSError:
            pass
        else:
            return _token_wanted(found[0])
    looked = (
        "one that `ray start` has made on this node, since RAY_ADDRESS is not set" if address == "auto" else address
    )
    return (
        f"there is no Ray cluster to train on: looked on {socket.gethostname()} for {looked}, and got: {error}. Start one with "
        "`ray up cluster/local.yaml` and submit this script to it with `ray submit cluster/local.yaml cluster/train.py -- …`; to "
        "train on one machine, `millrace train`"
    )


def _token_wanted(address: str) -> str:
    from cluster.auth import token_place

    token = token_place()
    shown = "no token was found (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token)"
    if token is not None:
        shown = f"the token in {token} is not the cluster's"
    return (
        f"the Ray cluster at {address} lets nobody in without its token, and on {socket.gethostname()} {shown}. It lies in "
        "~/.ray/auth_token of whoever ran `ray up`; file_mounts of the cluster's YAML copies it to every node: run `ray up` again, "
        "or copy the file"
    )


def _reach(address: str) -> None:
    """Raises OSError where `address` is `host:port` and nothing listens there: Ray itself would try for long."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()


def _say(text: str) -> None:
    print(f"train.py: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
