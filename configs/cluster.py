"""Settings of how a run is reached, and by whom: its control plane, and actors outside Ray."""

from __future__ import annotations

from configs.settings import Settings, setting


class ControlSettings(Settings):
    """The gRPC service of the head, by which `millrace status`, `scale`, `checkpoint`, `stop` and `logs` reach a run."""

    host: str = setting(
        "127.0.0.1",
        "Address that the service listens on; node takes the address of the head's node, for calls from other machines.",
        unit="address",
        min_length=1,
    )
    port: int = setting(0, "Port of the service; 0 takes a free one.", unit="port", ge=0, le=65_535)


class OutsideSettings(Settings):
    """Actors outside Ray, which join by the control plane: how many there may be, and what each may do."""

    most: int = setting(16, "Most actors outside Ray at once; 0 lets none join.", unit="processes", ge=0, le=100_000)
    lanes: int = setting(256, "Most lanes that each writes.", unit="lanes", ge=1, le=65_536)
    rows_per_s: float = setting(
        10_000.0,
        "Most rows per second that a shard takes from each; what comes faster waits.",
        unit="rows per second",
        gt=0.0,
        le=1e9,
    )
    bad_messages: int = setting(
        10,
        "Messages with rows that do not fit (not finite, outside the action's bounds, out of order) after which an actor is "
        "shut out; each of them is refused as a whole.",
        unit="messages",
        ge=1,
        le=1_000_000,
    )
    export_every_s: float = setting(
        5.0, "Least time between two exports of the policy for them.", unit="seconds", gt=0.0, le=86_400.0
    )
