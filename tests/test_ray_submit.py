"""`ray up`, `ray submit`, `ray rsync-down` and `ray down` with cluster/local.yaml, on machines that ssh reaches."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.nodes_for_tests import Inside, Network, requires_namespaces
from tests.runs_for_tests import ROOT

HOME = Path("/root")
RAY = str(Path(sys.executable).with_name("ray"))
SSHD = """\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/id.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile none
"""
DASHBOARD = "http://127.0.0.1:8265"  # where `ray dashboard` shows it on the laptop
STARTED_S = 180.0  # the longest that a worker may take to join
RUN_S = 500.0  # the longest that a run may take
LAPTOP = {"HOME": str(HOME), "OMP_NUM_THREADS": "1", "RAY_ADDRESS": "", "RAY_USAGE_STATS_ENABLED": "0"}
# 3 of its 4 actors fit on a node of 3 CPUs, and the learner on either.
SMALL_RUN = (
    *("pendulum_sac", "--json", "--wait-for-resources", "120", "--stop.steps", "2000", "--stop.mean_return", "none"),
    *("--actors.count", "4", "--actors.envs", "2", "--actors.cpus", "1", "--actors.random_steps", "200"),
    *("--replay.shards", "2", "--replay.min_size", "200", "--replay.capacity", "16384", "--eval.every", "0"),
    *("--learners.cpus", "0.5", "--learners.batch_size", "32", "--algorithm.hidden", "32", "32"),
)


class Site:
    """A laptop and two machines with ssh servers; the disk is not shared, but for this checkout and its Python."""

    def __init__(self, network: Network, folder: Path) -> None:
        """folder: for keys and logs; every machine sees it."""
        self.folder = folder
        for name in ("host_key", "id"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            subprocess.run(command, check=True)
        (folder / "sshd_config").write_text(SSHD.format(folder=folder))
        private = {HOME: "2g", Path("/run"): "16m"}
        self.laptop, self.head, self.worker = (
            network.add(shm="3g", private=private, keep=[folder, Path(sys.base_prefix)]) for _ in range(3)
        )
        for node in (self.head, self.worker):
            node.run("mkdir", "/run/sshd")
            command = ["/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd_config")]
            node.start(*command, log=folder / f"{node.name}-sshd.log")
        self.yaml = folder / "cluster.yaml"
        self.yaml.write_text(yaml.safe_dump(self._config()))

    def _config(self) -> dict[str, Any]:
        """cluster/local.yaml with the addresses and the user of these machines, which have Python and libraries already."""
        config: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / "local.yaml").read_text())
        config["provider"] = {"type": "local", "head_ip": self.head.address, "worker_ips": [self.worker.address]}
        config["auth"] = {"ssh_user": "root", "ssh_private_key": str(self.folder / "id")}
        install, environment = config["setup_commands"]
        assert install.startswith("make -C ~/millrace install ")
        installed = f"ln -sfn {sys.prefix} ~/millrace/.venv; echo 'export PYTHONPATH=$HOME/millrace' >> ~/.bashrc"
        config["setup_commands"] = [installed, environment]
        for kind in ("head", "worker"):
            stop, start = config[f"{kind}_start_ray_commands"]
            config[f"{kind}_start_ray_commands"] = [stop, f"{start} --num-cpus=3"]
        return config

    def start(self, *words: str, env: Mapping[str, str] | None = None) -> Inside:
        """Start a `ray` command on the laptop, from the checkout; its output is added to a log of its own."""
        return self.laptop.start(RAY, *words, cwd=ROOT, log=self.log(words), env=LAPTOP | dict(env or {}))

    def ray(self, *words: str, env: Mapping[str, str] | None = None, timeout_s: float = 120.0) -> str:
        """What a `ray` command prints on the laptop.

        Raises:
            RuntimeError: it failed, or took too long; the message holds what it printed.
        """
        log = self.log(words)
        log.unlink(missing_ok=True)
        process = self.start(*words, env=env)
        try:
            code: int | None = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            code = None
        said = log.read_text(errors="replace")
        if code != 0:
            raise RuntimeError(f"ray {' '.join(words)}: code {code}: {said}")
        return said

    def log(self, words: tuple[str, ...]) -> Path:
        return self.folder / f"ray-{words[0]}.log"

    def on_head(self, command: str, timeout_s: float = 60.0) -> str:
        """What a command prints that is run on the head as `ray submit` runs one.

        Raises:
            RuntimeError: it failed; the message holds what it printed.
        """
        return self.ray("exec", str(self.yaml), command, timeout_s=timeout_s)

    def actor_nodes(self, run: str) -> set[str]:
        """Addresses of the nodes that actors of a run ran on."""
        said = self.head.run("cat", f"{HOME}/runs/{run}/events.jsonl")
        texts = [json.loads(line)["text"] for line in said.splitlines()]
        return {found[1] for text in texts if (found := re.match(r"actor \d+ runs as process \d+ on (\S+)", text))}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    for tool in ("/usr/sbin/sshd", "ssh", "ssh-keygen", "rsync"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool} (Debian's packages openssh-server, openssh-client and rsync)")
    requires_namespaces()
    with Network() as network:
        yield Site(network, tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def cluster(site: Site) -> Iterator[Site]:
    """The site with both machines in a cluster."""
    site.laptop.run(RAY, "get-auth-token", "--generate")
    site.ray("up", "-y", str(site.yaml))
    deadline = time.monotonic() + STARTED_S
    while " 2 local.cluster.node" not in (status := site.on_head("ray status")):
        assert time.monotonic() < deadline, f"no worker joined: {status}"
        time.sleep(2.0)
    yield site
    site.ray("down", "-y", str(site.yaml))
    assert not [words for words in site.head.processes().values() if "/gcs_server" in words or "/raylet" in words]


def nodes_of(site: Site) -> set[str]:
    return {site.head.address, site.worker.address}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_submitted_run_uses_every_node_and_its_report_is_fetched(cluster: Site) -> None:
    words = (*SMALL_RUN, "--name", "submitted")
    said = cluster.ray("submit", str(cluster.yaml), "cluster/train.py", "--", *words, timeout_s=RUN_S)
    assert "train.py: attached to a cluster of 2 nodes with 6 CPUs and 0 GPUs" in said
    assert f"train.py: the run's folder is {HOME}/runs/submitted on {cluster.head.name}" in said
    assert cluster.actor_nodes("submitted") == nodes_of(cluster)
    result = json.loads(re.findall(r'{"run".*}', said)[-1])  # escape sequences of the live table come before it
    assert result["steps"] >= 2000
    assert result["updates"] > 0
    cluster.ray("rsync-down", str(cluster.yaml), f"{HOME}/runs/submitted/report.html", str(cluster.folder))
    assert "</html>" in (cluster.folder / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_job_runs_with_the_code_that_it_brings(cluster: Site) -> None:
    dashboard = cluster.start("dashboard", str(cluster.yaml))
    env = {"RAY_AUTH_MODE": "token"}
    try:
        deadline = time.monotonic() + 60.0
        while "Forwarding" not in cluster.log(("dashboard",)).read_text() or not _answers(cluster):
            assert time.monotonic() < deadline, cluster.log(("dashboard",)).read_text()
            time.sleep(1.0)
        command = ("python", "cluster/train.py", *SMALL_RUN, "--name", "job")
        words = ("job", "submit", "--address", DASHBOARD, "--working-dir", ".", "--", *command)
        said = cluster.ray(*words, env=env, timeout_s=RUN_S)
    finally:
        dashboard.kill()
    assert f"train.py: the run's folder is {HOME}/runs/job on {cluster.head.name}" in said
    assert cluster.actor_nodes("job") == nodes_of(cluster)


def _answers(site: Site) -> bool:
    try:
        site.laptop.run("bash", "-c", f"exec 3<> /dev/tcp/127.0.0.1/{DASHBOARD.rpartition(':')[2]}")
    except RuntimeError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ("RAY_AUTH_TOKEN=nonsense", "the token in the variable RAY_AUTH_TOKEN is not the cluster's"),
        ("HOME=/tmp/nobody", "no token was found (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token)"),
    ],
)
def test_train_says_what_is_wrong_with_the_token(cluster: Site, environment: str, message: str) -> None:
    with pytest.raises(RuntimeError, match="lets nobody in without its token") as caught:
        cluster.on_head(f"{environment} python $HOME/millrace/cluster/train.py pendulum_sac", timeout_s=200.0)
    assert message in str(caught.value)
    assert "Traceback" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_train_says_that_this_machine_is_in_no_cluster(site: Site) -> None:
    with pytest.raises(
        RuntimeError, match="there is no Ray cluster to train on: looked on node-0 for one that `ray start`"
    ):
        site.laptop.run(sys.executable, str(ROOT / "cluster" / "train.py"), "pendulum_sac", env=LAPTOP)
