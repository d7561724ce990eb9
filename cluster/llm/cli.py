"""`millrace eval` and `millrace export` for runs of language models."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from actors.llm.evaluate import summary
from cluster.checkpoint import Checkpoint, Checkpoints
from cluster.llm import parts
from cluster.recorder import POLICY
from cluster.runs import RunFolder
from configs.llm import LlmConfig


def evaluate(folder: RunFolder[LlmConfig], chosen: argparse.Namespace) -> int:
    """Evaluate a policy of a run on the held-out prompts; `chosen` as `millrace eval` parses it."""
    if chosen.video is not None:
        raise ValueError("--video draws environments; a language model has none")
    config = folder.config
    checkpoint = _checkpoint(folder, chosen.checkpoint)
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
        print(json.dumps({**found, "checkpoint": str(checkpoint.path), "seed": config.eval.seed}))
        return 0
    print(f"{checkpoint.path}: {found['prompts']:.0f} held-out prompts, {config.eval.samples} completions of each")
    for family in ("", *(f"{name}/" for name in dict.fromkeys(passes.families))):
        figures = [f"pass@{k} {found[f'{family}pass_at_{k}']:.3f}" for k in config.eval.attempts]
        print(f"  {family.rstrip('/') or 'all'}: {', '.join(figures)}, greedy {found[f'{family}greedy']:.3f}")
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


def _checkpoint(folder: RunFolder[LlmConfig], which: str) -> Checkpoint:
    checkpoints = Checkpoints(folder.checkpoints, keep=folder.config.checkpoints.keep)
    found = (checkpoints.best() if which == "best" else None) or checkpoints.latest()
    if found is None:
        raise FileNotFoundError(f"{folder.path} holds no whole checkpoint yet")
    return found
