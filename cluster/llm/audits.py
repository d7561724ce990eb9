"""How right the verifiers of a run are, told when it starts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from actors.llm.tasks import Task
from actors.llm.verifiers.audit import Audit, audit, labelled_sample, read_labelled
from actors.task_set import TaskSet
from configs.llm import TasksSettings

AUDITED = 200  # completions that are generated for a built-in verifier
AUDIT_FIGURES = ("total", "right", "false_negatives", "false_positives", "unscored")
BUILT_IN = ("countdown", "arithmetic", "math", "regex", "tests")


def audit_of(verifier: str, labelled: Path | None, *, count: int = AUDITED) -> Audit:
    """Audit a verifier on a file of labelled completions, or on generated ones.

    Raises:
        ValueError: there are no generated ones for it, or the file cannot be used.
    """
    return audit(verifier, labelled_sample(verifier, count, seed=0) if labelled is None else read_labelled(labelled))


def audit_text(verifier: str, found: Audit) -> str:
    """An audit in one line."""
    return (
        f"verifier {verifier}, audited on {found.total} labelled completions: {found.false_negatives} of {found.right} right ones "
        f"failed, {found.false_positives} of {found.total - found.right} wrong ones passed, {found.unscored} unscored"
    )


def audits(settings: TasksSettings, tasks: TaskSet[Task]) -> Iterator[tuple[str, str]]:
    """For every verifier of the prompts: the kind of event, and the line that tells of it."""
    for verifier in sorted({task.verifier for task in tasks}):
        if settings.labelled is None and verifier not in BUILT_IN:
            yield (
                "warning",
                f"verifier {verifier} was not audited: label some completions and name them in tasks.labelled",
            )
            continue
        found = audit_of(verifier, None if settings.labelled is None else Path(settings.labelled))
        wrong = found.false_negatives + found.false_positives + found.unscored
        yield "warning" if wrong else "start", audit_text(verifier, found)
