"""`millrace eval` and `millrace export` for runs of language models, and `millrace audit`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from actors.llm.evaluate import summary
from cluster.checkpoint import Checkpoint, Checkpoints
from cluster.files import without_nonfinite
from cluster.llm import parts
from cluster.llm.audits import AUDIT_FIGURES, AUDITED, audit_of, audit_text
from cluster.recorder import POLICY
from cluster.runs import RunFolder
from configs.llm import LlmConfig


def evaluate(folder: RunFolder[LlmConfig], chosen: argparse.Namespace) -> int:
    """Evaluate a policy of a run on the held-out prompts; `chosen` as `millrace eval` parses it."""
    if chosen.video is not None:
        raise ValueError("--video draws environments; a language model has none")
    config = folder.config
    checkpoint = _checkpoint(folder, chosen.checkpoint)
    if chosen.episodes is not None and chosen.episodes > config.eval.prompts:
        raise ValueError(
            f"--episodes: expected at most {config.eval.prompts} (eval.prompts), received {chosen.episodes}; the run may have been "
            "trained on the prompts beyond those that it held out"
        )
    changes = {
        name: value for name, value in (("prompts", chosen.episodes), ("seed", chosen.seed)) if value is not None
    }
    config = config.model_copy(update={"eval": config.eval.model_copy(update=changes)})
    evaluator = parts.make_evaluator(config, parts.make_sampling_model(config))
    try:
        passes = evaluator.run(1, (checkpoint.path / POLICY).read_bytes())
    finally:
        evaluator.close()
    found = summary(passes, attempts=config.eval.attempts, families=config.eval.families)
    if chosen.json:
        found_json = {**found, "checkpoint": str(checkpoint.path), "seed": config.eval.seed}
        print(json.dumps(without_nonfinite(found_json)))
        return 0
    print(f"{checkpoint.path}: {len(passes.families)} held-out prompts, {config.eval.samples} completions of each")
    for name, count in (
        ("completions that nobody could judge", passes.unscored),
        ("prompts that failed", passes.failed),
    ):
        if count:
            print(f"  left out: {count} {name}")
    whole = ", ".join(config.eval.families) or "all"
    for prefix, family in (("", whole), *((f"{name}/", name) for name in sorted(set(passes.families)))):
        figures = [f"pass@{k} {found[f'{prefix}pass_at_{k}']:.3f}" for k in config.eval.attempts]
        print(f"  {family}: {', '.join(figures)}, greedy {found[f'{prefix}greedy']:.3f}")
    return 0


def export(folder: RunFolder[LlmConfig], chosen: argparse.Namespace) -> int:
    """Write a policy of a run as a folder that transformers loads; `chosen` as `millrace export` parses it."""
    from learners.llm.models import load_weights, save_model

    checkpoint = _checkpoint(folder, chosen.checkpoint)
    target = Path(chosen.file)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists already; a language model is exported into a new folder")
    # In float32, whatever actors sample in: the checkpoint holds the learner's weights.
    plain = folder.config.model.model_copy(update={"lora_rank": None})
    model = parts.make_model(folder.config.model_copy(update={"model": plain}), device="cpu")
    load_weights(model.network, (checkpoint.path / POLICY).read_bytes())
    save_model(model, target)
    if chosen.json:
        print(json.dumps({"model": str(target), "checkpoint": str(checkpoint.path)}))
    else:
        print(f"{target}: the model of {checkpoint.path}, for transformers' AutoModelForCausalLM.from_pretrained")
    return 0


def audit_verifier(words: Sequence[str]) -> int:
    """`millrace audit`: how often a verifier is wrong on completions whose truth is known."""
    parser = argparse.ArgumentParser(
        prog="millrace audit", description="Count how often a verifier fails right completions and passes wrong ones."
    )
    parser.add_argument("verifier", help="countdown, arithmetic, math, regex, tests or package.module:function")
    parser.add_argument(
        "labelled", nargs="?", type=Path, help=".jsonl with completion, data, passed (default: generated)"
    )
    parser.add_argument("--count", type=int, default=AUDITED, help=f"completions generated (default {AUDITED})")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    chosen = parser.parse_args(words)
    found = audit_of(chosen.verifier, chosen.labelled, count=chosen.count)
    if chosen.json:
        print(json.dumps({name: getattr(found, name) for name in AUDIT_FIGURES}))
        return 0
    print(audit_text(chosen.verifier, found))
    for one, reason in found.examples:
        label = "right" if one.passed else "wrong"
        print(f"  {label}: {one.completion!r} for {dict(one.data)}" + (f" ({reason})" if reason else ""))
    return 0


def _checkpoint(folder: RunFolder[LlmConfig], which: str) -> Checkpoint:
    checkpoints = Checkpoints(folder.checkpoints, keep=folder.config.checkpoints.keep)
    found = (checkpoints.best() if which == "best" else None) or checkpoints.latest()
    if found is None:
        raise FileNotFoundError(f"{folder.path} holds no whole checkpoint yet")
    return found
