"""Several learners as one: gradients averaged, decisions agreed, and the lost one named.

Data parallel training: every learner holds all parameters and takes an equal part of each batch; the mean of their
gradients is the gradient of the whole batch, so all parameters stay equal. Gradients go by NCCL between GPUs and by gloo
between CPUs; what is agreed and broadcast always goes by gloo, so that no GPU is waited for. The traffic is neither
encrypted nor authenticated: the nodes of the learners need a network of their own, as Ray's do.
"""

from __future__ import annotations

import re
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

TIMEOUT_S = 300.0  # longer than a learner holds still while its state is copied
JOIN_S = 60.0
ROLL_CALL_S = 3.0  # how long those who are left may take to say so


class GroupError(RuntimeError):
    """A learner of the group is missing; the message names it."""


@dataclass(frozen=True)
class Agreement:
    """What all learners decided together: whether to stop, whether each has a batch, and the extent of returns seen.

    extent: lowest and highest discounted return that any learner was told of; None where none was told of any.
    """

    stop: bool
    ready: bool
    extent: tuple[float, float] | None


class Rendezvous:
    """Where the learners of a group find each other: a store that learner 0 keeps, on any free port of `host`."""

    def __init__(self, host: str) -> None:
        listener = socket.create_server((host, 0))
        self.address = f"{host}:{listener.getsockname()[1]}"
        port = listener.getsockname()[1]
        # The store takes the socket over: no other process can come between choosing the port and listening on it.
        self.store = TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=JOIN_S),
            master_listen_fd=listener.detach(),
        )


class Group:
    """One learner's part in a group; made by `join`. For the thread that makes the updates."""

    def __init__(self, rank: int, count: int, store: TCPStore, *, device: torch.device, timeout_s: float) -> None:
        self.rank = rank
        self.count = count
        self._store = store
        self._timeout_s = timeout_s
        self._calls = 0  # collective calls made: a number that all learners have in common
        timeout = timedelta(seconds=timeout_s)
        is_cuda = device.type == "cuda"
        if is_cuda:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if is_cuda else "gloo", store=store, rank=rank, world_size=count, timeout=timeout
        )
        self._gradients = dist.group.WORLD
        self._control = dist.new_group(backend="gloo", timeout=timeout) if is_cuda else self._gradients

    def mean_(self, tensor: Tensor) -> None:
        """Makes a tensor, of one shape on all learners, the mean over them, in place; on a GPU without waiting for it.

        Raises GroupError when a learner is missing.
        """
        self._call(dist.all_reduce, tensor, group=self._gradients)
        tensor.div_(self.count)

    def agree(self, *, stop: bool, ready: bool, extent: tuple[float, float] | None) -> Agreement:
        """What follows from what every learner says; all of them call it, as often. Raises GroupError as `mean_`."""
        low, high = extent or (float("inf"), float("-inf"))
        said = torch.tensor([stop, not ready, -low, high], dtype=torch.float64)
        self._call(dist.all_reduce, said, op=dist.ReduceOp.MAX, group=self._control)
        any_stop, any_waits, below, high = said.tolist()
        return Agreement(bool(any_stop), not any_waits, None if high == float("-inf") else (-below, high))

    def broadcast(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The named tensors of learner 0, on the CPU, whatever the others pass. Raises GroupError as `mean_`."""
        packed = save({name: tensor.contiguous().cpu() for name, tensor in state.items()}) if self.rank == 0 else b""
        size = torch.tensor([len(packed)])
        self._call(dist.broadcast, size, src=0, group=self._control)
        data = torch.frombuffer(bytearray(packed or int(size)), dtype=torch.uint8)
        self._call(dist.broadcast, data, src=0, group=self._control)
        return load(data.numpy().tobytes())

    def close(self) -> None:
        """Leaves the group; the others' next call fails."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _call(self, collective: Any, tensor: Tensor, **arguments: Any) -> None:
        self._calls += 1
        try:
            collective(tensor, **arguments)
        except RuntimeError as error:
            raise GroupError(self._missing(error)) from error

    def _missing(self, error: RuntimeError) -> str:
        """Who does not answer a roll call: each learner whose call failed puts its name into the store."""
        # gloo begins with a line of its source and ends with advice about other programs.
        reason = re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0]).partition(". This is typically")[0]
        try:
            self._store.set_timeout(timedelta(seconds=ROLL_CALL_S))
            self._store.set(f"here/{self._calls}/{self.rank}", "")
            deadline = time.monotonic() + ROLL_CALL_S
            missing = set(range(self.count)) - {self.rank}
            while missing and time.monotonic() < deadline:
                missing = {rank for rank in missing if not self._store.check([f"here/{self._calls}/{rank}"])}
                time.sleep(0.05)
        except (RuntimeError, ConnectionError):  # the store is gone with the learner that kept it
            missing = {0}
        who = _named(missing) if missing else "none of the learners is missing, and the connection between them"
        return f"learner {self.rank} of {self.count}: {who} did not answer within {self._timeout_s:g} s or was lost: {reason}"


def join(
    rank: int,
    count: int,
    address: str,
    device: str | torch.device,
    *,
    rendezvous: Rendezvous | None = None,
    join_s: float = JOIN_S,
    timeout_s: float = TIMEOUT_S,
) -> Group:
    """Becomes learner `rank` of `count`, once all are there; a process can be in one group.

    Args:
        rank: 0 … count − 1; learner 0 passes the `rendezvous` that it keeps.
        address: `Rendezvous.address` of learner 0.
        device: where the gradients lie.
        join_s: seconds until all must be there.
        timeout_s: seconds that a learner may be behind the others in any later call.

    Raises:
        GroupError: some did not come within `join_s`; the message names them.
    """
    host, _, port = address.rpartition(":")
    try:
        store = TCPStore(host, int(port), timeout=timedelta(seconds=join_s)) if rank else _kept(rendezvous)
        store.set(f"joined/{rank}", "")
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise GroupError(f"learner {rank} of {count} found no learner 0 at {address} within {join_s:g} s") from error
    deadline = time.monotonic() + join_s
    missing = set(range(count))
    while missing := {other for other in missing if not store.check([f"joined/{other}"])}:
        if time.monotonic() > deadline:
            raise GroupError(f"learner {rank} of {count}: {_named(missing)} did not join within {join_s:g} s")
        time.sleep(0.02)
    return Group(rank, count, store, device=torch.device(device), timeout_s=timeout_s)


def _kept(rendezvous: Rendezvous | None) -> TCPStore:
    if rendezvous is None:
        raise ValueError("learner 0 keeps the store: expected its rendezvous, received None")
    return rendezvous.store


def _named(ranks: set[int]) -> str:
    return ("learner " if len(ranks) == 1 else "learners ") + ", ".join(map(str, sorted(ranks)))
