"""The model of how far a run scales: its sums, and what it says is full."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.benchmarks.scale import DESIGNS, Scenario, answer, check, edges, limit, load
from tests.benchmarks.scale_costs import Costs

COSTS = Costs(
    idle=0.01,
    serve=5e-4,
    call=3e-4,
    relay_serve=5e-4,
    relay_status=4e-4,
    look=1e-3,
    relayed_status=1e-5,
    books=1e-5,
    exchange=1e-4,
    put_byte=5e-10,
    insert_row=2e-7,
    insert_message=5e-5,
    sample_row=6e-7,
    lease=4e-4,
)


def messages(asked: Scenario, design: str, *, at: str) -> float:
    """Messages each second of all edges that begin or end at a role."""
    return sum(edge.messages_per_s for edge in edges(asked, design) if at in edge.name.partition(":")[0])


@given(st.integers(1, 200_000), st.integers(1, 256), st.sampled_from([0.0, 0.5, 10.0]))
def test_relays_take_from_the_head_what_grows_with_actors(actors: int, per_node: int, exchanges: float) -> None:
    asked = Scenario(actors=actors, actors_per_node=per_node, exchanges_per_s=exchanges)
    # Polls are at least 20 for each actor; what remains are a look, a push and at most 20 exchanges for each node.
    assert messages(asked, "direct", at="head") >= 21 * actors
    others = messages(replace(asked, actors=0, exchanges_per_s=0.0), "direct", at="head")
    assert messages(asked, "relays", at="head") - others <= asked.nodes * (1 + 2 + 20) + 1e-6


@given(st.floats(1e3, 1e7), st.sampled_from(DESIGNS))
def test_a_resource_is_full_at_its_limit_and_not_before(rows: float, design: str) -> None:
    asked = Scenario(rows_per_actor=rows / 1e4)
    for name in load(asked, COSTS, design):
        most = limit(asked, lambda s, name=name: load(s, COSTS, design)[name])  # type: ignore[misc]
        if math.isfinite(most) and most > 1:
            assert load(replace(asked, actors=int(most)), COSTS, design)[name] < 1.0
            assert load(replace(asked, actors=int(most) + 2), COSTS, design)[name] >= 1.0


def test_what_is_full_first_is_what_has_the_least_room() -> None:
    # Few rows, so that only what grows with actors counts.
    asked = Scenario(rows_per_actor=0.01)
    direct, relays = (answer(asked, COSTS, design) for design in DESIGNS)
    assert direct["full_first"] == "head"
    # 20 polls of 0.5 ms, one with the new weights, half an exchange, a status of 0.3 ms: about 11 ms of a core for each.
    assert 60 < direct["actors_at_full"]["head"] < 95
    assert relays["actors_at_full"]["head"] > 20 * direct["actors_at_full"]["head"]
    # With many rows it is the lease that each message of them needs.
    many = answer(Scenario(rows_per_actor=1000.0), COSTS, "relays")
    assert many["full_first"] == "shard 0, which leases to the others"


def test_errors_are_relative_to_what_was_measured() -> None:
    measured = {"head": {"runs": [{"actors": 4, "cpu_s_per_s": 0.05, "calls_in_per_s": 3.0}]}}
    (line,) = check(measured, COSTS)
    assert (line["design"], line["actors"]) == ("direct", 4)
    assert line["calls_in_per_s"] == {"predicted": 6.0, "measured": 3.0, "error": 1.0}
    cpu = line["cpu_s_per_s"]
    assert cpu["error"] == pytest.approx(cpu["predicted"] / 0.05 - 1.0)
    assert cpu["predicted"] == pytest.approx(0.01 + 6 * 5e-4 + 6 * 3e-4 + 4 * 1e-5)
    assert "calls_out_per_s" not in line
