"""Learners as processes of a group: the parameters of one, decisions in common, and a lost one named."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.queues import Queue
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.algorithms import ChainSettings, DqnSettings, FlowSettings, HeadSettings, SacSettings, TargetSettings
from learners.distributed import Agreement, Group, GroupError, Rendezvous, join
from learners.dqn import Dqn
from learners.flow import Flow
from learners.loop import LearnerLoop
from learners.sac import Sac
from learners.staging import Share
from replay.schema import Field, StepSchema, WindowBatch

SCHEMA = StepSchema({"observation": Field("observation", "float32", (5,))}, Field("action", "float32", (2,)))
DISCRETE = StepSchema({"observation": SCHEMA.observations[0]}, Field("action", "int64", choices=3))
OTHERS = ("sac", "flow", "dqn")
BATCH, UPDATES, STEPS = 16, 100, 2
Work = Callable[[Group], Any]
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["learners.sac", "learners.dqn", "learners.flow", "learners.loop"]
)  # torch is imported once, not once per process


def _learner(work: Work, rank: int, count: int, address: str, rendezvous: Rendezvous | None, timeout_s: float) -> Any:
    torch.set_num_threads(1)
    group = join(rank, count, address, "cpu", rendezvous=rendezvous, join_s=60.0, timeout_s=timeout_s)
    try:
        return work(group)
    finally:
        group.close()


def _process(
    work: Work, rank: int, count: int, address: str, timeout_s: float, results: Queue[tuple[int, Any]]
) -> None:
    results.put((rank, _learner(work, rank, count, address, None, timeout_s)))


def in_a_group(work: Work, count: int, *, timeout_s: float = 60.0) -> list[Any]:
    """What `work` returns on each of `count` learners: the first is this process, the others are started."""
    rendezvous = Rendezvous("127.0.0.1")
    results: Queue[tuple[int, Any]] = PROCESSES.Queue()
    others = [
        PROCESSES.Process(
            target=_process, args=(work, rank, count, rendezvous.address, timeout_s, results), daemon=True
        )
        for rank in range(1, count)
    ]
    for process in others:
        process.start()
    first = _learner(work, 0, count, rendezvous.address, rendezvous, timeout_s)
    found = dict(results.get(timeout=60.0) for _ in others) | {0: first}
    for process in others:
        process.join(30.0)
    return [found[rank] for rank in range(count)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- the same parameters ----------------------------------------------------------------------------------------------


def windows(generator: np.random.Generator, part: slice, schema: StepSchema = SCHEMA) -> WindowBatch:
    """A part of a random batch of two-step windows, some of which are shorter."""
    steps = np.zeros((BATCH, STEPS + 1), schema.dtype)
    for name in ("observation", "action", "reward"):
        steps[name] = generator.uniform(-1, 1, steps[name].shape)
    if schema.action.choices:
        steps["action"] = generator.integers(schema.action.choices, size=steps["action"].shape)
    length = generator.integers(1, STEPS + 1, BATCH).astype(np.int32)
    steps["is_terminal"][np.arange(BATCH), length] = generator.random(BATCH) < 0.2
    zeros = np.zeros(BATCH, np.int64)
    return WindowBatch(steps[part], length[part], zeros[part], zeros[part].astype("i4"), np.ones(BATCH)[part])


def train(share: Share, dtype: torch.dtype, subset: int | None) -> dict[str, Tensor]:
    """The state after UPDATES updates, of the learner that has this share of each batch."""
    settings = SacSettings(
        hidden=(24, 16),
        critic_lr=1e-3,
        ensemble=3,
        subset=subset,
        target=TargetSettings(kind="n_step", length=STEPS),
    )
    size = BATCH // share.count
    algorithm = Sac(SCHEMA, settings, batch_size=size, device="cpu", seed=3, dtype=dtype, share=share)
    generator = np.random.default_rng(0)
    for _ in range(UPDATES):
        algorithm.update(windows(generator, slice(share.rank * size, (share.rank + 1) * size)))
    return algorithm.state()


def _train_in_double(group: Group) -> dict[str, Any]:
    share = Share(group.rank, group.count, group.mean_)
    return {
        str(dtype): {name: t.numpy() for name, t in train(share, dtype, subset=2).items()}
        for dtype in (torch.float64, torch.float32)
    }


def test_two_learners_with_half_the_batch_have_the_parameters_of_one() -> None:
    found = in_a_group(_train_in_double, 2)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        alone = train(Share(), dtype, subset=2)
        start = Sac(
            SCHEMA, SacSettings(hidden=(24, 16), ensemble=3), batch_size=BATCH, device="cpu", seed=3, dtype=dtype
        )
        moved = alone["critic.online.value"] - start.state()["critic.online.value"]
        assert moved.abs().max() > 0.01, "a comparison of parameters that have hardly moved says little"
        one, two = (learner[str(dtype)] for learner in found)
        for name, tensor in alone.items():
            np.testing.assert_array_equal(one[name], two[name], err_msg=name)
            if tensor.is_floating_point():
                np.testing.assert_allclose(one[name], tensor.numpy(), rtol=0.0, atol=tolerance, err_msg=name)


def _train_others(group: Group) -> dict[str, Any]:
    share = Share(group.rank, group.count, group.mean_)
    return {name: {key: t.numpy() for key, t in train_other(name, share).items()} for name in OTHERS}


def train_other(name: str, share: Share) -> dict[str, Tensor]:
    """The state after 50 updates in float64."""
    target = TargetSettings(kind="n_step", length=STEPS)
    head = HeadSettings(kind="hl_gauss", low=-4.0, high=4.0, bins=21)
    chain = ChainSettings(length=3, policy_value="one", copy_every=7)
    size = BATCH // share.count
    options: dict[str, Any] = {"batch_size": size, "device": "cpu", "seed": 3, "dtype": torch.float64, "share": share}
    algorithm: Any
    if name == "sac":
        settings = SacSettings(hidden=(16,), target=target, head=head, chain=chain, normalise_observations=True)
        algorithm = Sac(SCHEMA, settings, **options)
    elif name == "flow":
        algorithm = Flow(SCHEMA, FlowSettings(hidden=(16,), target=target, proposals=4), **options)
    else:
        algorithm = Dqn(DISCRETE, DqnSettings(hidden=(16,), target=target, head=head, lr=1e-3), **options)
    generator = np.random.default_rng(0)
    for _ in range(50):
        part = slice(share.rank * size, (share.rank + 1) * size)
        algorithm.update(windows(generator, part, DISCRETE if name == "dqn" else SCHEMA))
    state: dict[str, Tensor] = algorithm.state()
    return state


def test_every_algorithm_is_the_same_in_parts() -> None:
    """Chains, classification, running normalisation and what flows draw, too."""
    first, second = in_a_group(_train_others, 2)
    for name in OTHERS:
        for key, tensor in train_other(name, Share()).items():
            np.testing.assert_array_equal(first[name][key], second[name][key], err_msg=f"{name} {key}")
            if tensor.is_floating_point():
                np.testing.assert_allclose(
                    first[name][key], tensor.numpy(), rtol=0.0, atol=1e-9, err_msg=f"{name} {key}"
                )


# -- decisions --------------------------------------------------------------------------------------------------------


def _agree(group: Group) -> list[Any]:
    rank = group.rank
    mean = torch.tensor([float(rank), 3.0 * rank])
    group.mean_(mean)
    return [
        mean.tolist(),
        group.agree(stop=False, ready=True, extent=None),
        group.agree(stop=False, ready=rank == 0, extent=None),
        group.agree(stop=rank == 1, ready=True, extent=(-1.0, 2.0) if rank == 2 else None),
        group.agree(stop=False, ready=True, extent=(float(-rank), float(rank))),
        {name: tensor.tolist() for name, tensor in group.broadcast({"a": torch.full((2,), float(rank))}).items()},
    ]


def test_three_learners_average_agree_and_hear_the_first() -> None:
    expected = [
        [1.0, 3.0],
        Agreement(stop=False, ready=True, extent=None),
        Agreement(stop=False, ready=False, extent=None),
        Agreement(stop=True, ready=True, extent=(-1.0, 2.0)),
        Agreement(stop=False, ready=True, extent=(-2.0, 2.0)),
        {"a": [0.0, 0.0]},
    ]
    assert in_a_group(_agree, 3) == [expected] * 3


class Windows:
    """A sampler of one learner; that of learner 1 has nothing to give now and then."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._generator = np.random.default_rng(rank)
        self._served = 0

    def sample(self, timeout_s: float) -> WindowBatch:
        self._served += 1
        if self._rank == 1 and self._served % 20 == 0:
            time.sleep(timeout_s)
            raise TimeoutError
        return windows(self._generator, slice(0, BATCH // 2))

    def update_priorities(self, batch: WindowBatch, priorities: np.ndarray) -> None:
        raise AssertionError("all are drawn alike")

    def close(self) -> None:
        pass


def _loop(group: Group) -> tuple[int, list[int], list[tuple[float, float]], float]:
    """Runs a loop that learner 1 is told to end; learner 0 is told of returns."""
    seen: list[tuple[float, float]] = []
    published: list[int] = []
    until = threading.Event()

    class Watched(Sac):
        def observe_returns(self, low: float, high: float) -> None:
            seen.append((low, high))

        def update(self, batches: Any) -> Tensor | None:
            made = super().update(batches)
            if self.updates == 50 and group.rank == 1:
                until.set()
            return made

    share = Share(group.rank, group.count, group.mean_)
    settings = SacSettings(hidden=(8,), target=TargetSettings(kind="n_step", length=STEPS))
    algorithm = Watched(SCHEMA, settings, batch_size=BATCH // 2, device="cpu", seed=3, share=share)
    loop = LearnerLoop(
        algorithm,
        Windows(group.rank),
        publish=(lambda version, data: published.append(version)) if group.rank == 0 else None,
        publish_every=10,
        prefetch=2,
        group=group,
    )
    if group.rank == 0:
        loop.tell_returns(-1.0, 4.0)
    loop.run(until)
    return algorithm.updates, published, seen, float(algorithm.state()["critic.online.value"].sum())


def test_loops_make_the_same_updates_and_end_together_though_one_has_to_wait() -> None:
    (updates, published, seen, total), other = in_a_group(_loop, 2)
    assert updates >= 50
    assert other == (updates, [], seen, total)
    assert seen == [(-1.0, 4.0)]
    assert published[-1] == updates // 10


# -- the lost ---------------------------------------------------------------------------------------------------------


def _lose_the_last(group: Group) -> str:
    tensor = torch.zeros(3)
    group.mean_(tensor)
    if group.rank == group.count - 1:
        return "left"
    began = time.monotonic()
    try:
        group.mean_(tensor)
    except GroupError as error:
        assert time.monotonic() - began < 20.0
        return str(error)
    return "no error"


def test_a_learner_that_is_lost_is_named() -> None:
    first, second, last = in_a_group(_lose_the_last, 3, timeout_s=5.0)
    assert last == "left"
    assert first.startswith("learner 0 of 3: learner 2 did not answer within 5 s or was lost: ")
    assert second.startswith("learner 1 of 3: learner 2 did not answer within 5 s or was lost: ")


def test_one_that_does_not_join_is_named() -> None:
    rendezvous = Rendezvous("127.0.0.1")
    with pytest.raises(GroupError, match=r"learner 0 of 3: learners 1, 2 did not join within 0\.3 s"):
        join(0, 3, rendezvous.address, "cpu", rendezvous=rendezvous, join_s=0.3)


def test_a_group_without_its_first_learner_is_an_error() -> None:
    with pytest.raises(GroupError, match=r"learner 1 of 2 found no learner 0 at 127\.0\.0\.1:1 within 1 s"):
        join(1, 2, "127.0.0.1:1", "cpu", join_s=1.0)
