"""What a person sees while a language-model run goes on."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from cluster.live import LiveTable, compact, duration, number, share
from configs.llm import LlmConfig


class LlmLive(LiveTable):
    """The live table of a run that trains a language model."""

    UNIT = ("updates", "learner steps")
    SCORE = ("eval/pass_at_1", "eval/step")

    def __init__(
        self, config: LlmConfig, *, console: Console | None = None, silent: bool = False, line_every_s: float = 5.0
    ) -> None:
        self._config = config  # first, for the table may be drawn at once
        super().__init__(stop_wall_s=config.stop.wall_s, console=console, silent=silent, line_every_s=line_every_s)

    def title(self) -> str:
        config = self._config
        model = config.model.path or "embedded model"
        return f"{config.tasks.source} · {model} · {config.algorithm.loss}" + (
            f" · {config.name}" if config.name else ""
        )

    def stop_at(self) -> int | None:
        return self._config.stop.updates

    def cells(self) -> Sequence[str]:
        get = self._row.get
        evaluation = number(self._evaluation[0], 3) if self._evaluation else "–"
        return (
            f"{duration(get('wall_s', get('time_s'))):>8}",
            f"steps {compact(get('updates')):>6}/{compact(self._config.stop.updates)}",
            f"answers {compact(get('samples')):>6}",
            f"{number(get('samples_per_s')):>6}/s",
            f"reward {number(get('reward/mean'), 3):>6}",
            f"pass@1 {evaluation:>5}",
            f"entropy {number(get('entropy'), 2):>5}",
            f"age {number(get('staleness/mean'), 1):>4}",
            f"waste {share(get('waste/share')):>4}",
            f"left {duration(self.time_left_s()):>7}",
        )

    def pairs(self) -> list[tuple[str, str]]:
        get = self._row.get
        return [
            ("completions/s", number(get("samples_per_s"))),
            ("learner steps/s", number(get("updates_per_s"), 2)),
            ("completions sampled", compact(get("samples"))),
            ("groups kept", f"{share(get('kept_share'))}, {share(get('waste/share'))} of the tokens wasted"),
            ("reward learnt from", number(get("reward/mean"), 3)),
            ("last pass@1", self.evaluation_text(self._config.stop.pass_at_1, 3)),
            ("age of tokens", f"{number(get('staleness/mean'), 1)} versions"),
            ("entropy", f"{number(get('entropy'), 2)} nats, {number(get('length/mean'), 1)} tokens"),
        ]
