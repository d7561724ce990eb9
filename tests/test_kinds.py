"""What runs of every kind share: settings told apart by `kind`, folders, checkpoints, and what a resumed run may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.checkpoint import Checkpoints, read_manifest
from cluster.cli import main
from cluster.files import read_json
from cluster.head import Evaluation, Head, Tick
from cluster.llm.head import LlmEvaluation, LlmHead, LlmTick
from cluster.recorder import HEAD, LEARNER, POLICY, Recorder, settings_changed
from cluster.resume import check_resumable
from cluster.runs import RunFolder
from configs.llm import LlmConfig
from configs.load import ConfigError, load_run
from configs.schema import RunConfig


def llm(**settings: Any) -> LlmConfig:
    return LlmConfig.model_validate(settings)


def test_the_kind_says_which_settings_there_are(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("kind: llm\nsampling:\n  group_size: 4\n")
    config = load_run(file, ["--learners.batch_groups", "8"])
    assert isinstance(config, LlmConfig)
    assert (config.sampling.group_size, config.learners.batch_groups) == (4, 8)
    assert isinstance(load_run(file, ["--kind", "llm"]), LlmConfig)
    assert isinstance(load_run(None, ["--kind", "control"]), RunConfig)
    assert isinstance(load_run(None), RunConfig)
    with pytest.raises(ConfigError, match="sampling"):
        load_run(file, ["--kind", "control"])


def test_a_wrong_kind_is_the_only_thing_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("kind: lm\nsampling:\n  group_size: 4\n")
    assert main(["train", str(file)]) == 2
    told = f"millrace: kind: expected one of control, llm, got 'lm'; did you mean llm? ({file}:1)\n"
    assert capsys.readouterr().err == told
    with pytest.raises(ConfigError, match=r"^kind: expected one of control, llm, got nothing \(null\)"):
        load_run(_written(tmp_path / "b.yaml", "kind:\n"))


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_folder_is_opened_with_the_settings_of_its_kind(tmp_path: Path) -> None:
    run = RunFolder.create(llm(root=str(tmp_path), tasks={"source": "my.tasks:make", "kwargs": {"n": 2}}), ["a"])
    assert run.path.name.startswith("my.tasks-make-clip-20")
    assert RunFolder.open(run.path).config == run.config
    assert run.security().token == RunFolder.open(run.path).security().token

    control = RunFolder.create(RunConfig(root=str(tmp_path), name="control"), [])
    file = control.path / "config.yaml"
    values = yaml.safe_load(file.read_text())
    del values["kind"]  # as a run of an earlier version wrote it
    file.write_text(yaml.safe_dump(values))
    assert RunFolder.open(control.path).config == control.config


@pytest.mark.parametrize(
    ("source", "name"), [("data/train set.jsonl", "train-set.jsonl"), ("…", "run"), ("x" * 200, "x" * 60)]
)
def test_a_default_name_is_one_that_a_folder_can_have(source: str, name: str, tmp_path: Path) -> None:
    run = RunFolder.create(llm(root=str(tmp_path), tasks={"source": source}, algorithm={"loss": "cispo"}), [])
    assert run.path.name.startswith(f"{name}-cispo-20")


def llm_shard(groups: int) -> dict[str, int]:
    return {"inserted_groups": groups, "consumed_groups": 0, "dropped_stale_groups": 0, "waiting_groups": groups}


def control_head(config: RunConfig) -> Head:
    """At environment step 30 and update 7, evaluated there."""
    head = Head(config, wall_started=0.0)
    head.tick(Tick(1.0, shards={"shard 0": {"inserted": 30, "sampled": 0, "items": 30, "capacity": 99}}))
    head.counts.updates = 7
    head.evaluated(Evaluation(30, 1, (2.0,), 1.0))
    return head


def llm_head(config: LlmConfig) -> LlmHead:
    """At learner step 7, evaluated there."""
    head = LlmHead(config, wall_started=0.0)
    head.tick(LlmTick(1.0, shards={"shard 0": llm_shard(30)}))
    head.counts.updates = 7
    figures = {"seconds": 1.0, "pass_at_1": 0.5, "pass_at_1_error": 0.1, "greedy": 0.5, "prompts": 4.0}
    head.evaluated(LlmEvaluation(7, 1, figures))
    return head


@pytest.mark.parametrize("kind", ["control", "llm"])
def test_a_checkpoint_is_named_by_the_step_of_its_kind_and_keeps_what_its_head_knows(kind: str, tmp_path: Path) -> None:
    common = {"root": str(tmp_path), "name": "a"}
    config = llm(**common) if kind == "llm" else RunConfig.model_validate(common)
    folder: RunFolder[Any] = RunFolder.create(config, [])
    head = llm_head(config) if isinstance(config, LlmConfig) else control_head(config)
    recorder = Recorder(folder, head, show=lambda row, line: None, resume=None)
    newest = llm_shard(34) if kind == "llm" else {"inserted": 34, "sampled": 0}

    def save_learner(path: Path) -> int:
        path.write_bytes(b"learner")
        return 8

    def save_shards(path: Path, before: Path | None) -> dict[str, dict[str, int]]:
        path.mkdir()
        (path / "rows").write_bytes(b"rows")
        return {"shard 0": newest}

    assert recorder.checkpoint(
        save_learner=save_learner,
        save_shards=save_shards,
        save_more=lambda path: write_more(path / "more"),
        policy=b"policy",
        evaluation=head.evaluation_now,
    )
    recorder.close()
    step = 7 if kind == "llm" else 30
    path = folder.checkpoints / f"step_{step:012d}"
    manifest = read_manifest(path)
    assert (manifest.env_steps, manifest.eval_mean_return) == (step, 0.5 if kind == "llm" else 2.0)
    assert {file.path for file in manifest.files} == {LEARNER, POLICY, HEAD, "replay/rows", "more"}
    best = Checkpoints(folder.checkpoints).best()
    assert best is not None
    assert best.path == path

    state = read_json(path / HEAD)
    assert state["counts"]["updates"] == 8
    # Those that came in since the last look are counted as well.
    assert state["counts"]["inserted_groups" if kind == "llm" else "env_steps"] == 34
    again = type(head)(config, wall_started=0.0, state=state)  # type: ignore[arg-type]
    assert again.counts.incarnation == head.counts.incarnation + 1
    assert (again.best, again.state()["next_eval"]) == (head.best, head.state()["next_eval"])

    assert settings_changed(path, config) == []
    changed = config.model_copy(update={"replay": config.replay.model_copy(update={"shards": 2})})
    assert settings_changed(path, changed)[0].startswith("replay.shards: saved 1, now 2")


def write_more(path: Path) -> None:
    path.write_bytes(b"more")


MODEL: dict[str, Any] = {"lora_rank": 4, "lora_alpha": 8.0}


@pytest.mark.parametrize(
    ("before", "after", "paths"),
    [
        ({}, {"learners": {"learning_rate": 1e-5}, "tasks": {"timeout_s": 9.0}, "sampling": {"top_k": 5}}, []),
        # Else prompts that were learnt from would be held out.
        ({}, {"seed": 1, "tasks": {"count": 300}, "eval": {"prompts": 9}}, ["seed", "tasks.count", "eval.prompts"]),
        ({}, {"model": {"layers": 3, "width": 32}}, ["model.layers", "model.width"]),
        # A model in a folder has the shape that it has there.
        ({}, {"model": {"path": "there", "layers": 3}}, ["model.path"]),
        ({"model": {"path": "a"}}, {"model": {"path": "a", "layers": 3}}, []),
        ({}, {"model": {"lora_rank": 4}}, ["model.lora_rank"]),
        ({}, {"model": {"lora_alpha": 4.0}}, []),  # there are no additions that it could scale
        ({"model": MODEL}, {"model": {**MODEL, "lora_alpha": 4.0}}, ["model.lora_alpha"]),
    ],
)
def test_a_resumed_run_keeps_its_model_and_prompts_and_may_change_all_else(
    before: dict[str, Any], after: dict[str, Any], paths: list[str]
) -> None:
    old, new = (llm(warm_start={"steps": 0}, **settings) for settings in (before, after))
    if not paths:
        check_resumable(old, new)
        return
    with pytest.raises(ValueError, match="the checkpoint was trained with") as refused:
        check_resumable(old, new)
    assert [line.partition(":")[0] for line in str(refused.value).splitlines()] == paths


def test_a_run_is_not_resumed_as_one_of_another_kind() -> None:
    with pytest.raises(
        ValueError, match=r"^kind: the checkpoint was trained with control, received llm; resume with"
    ) as e:
        check_resumable(RunConfig(), llm())
    assert "\n" not in str(e.value)


def test_evaluations_of_a_language_model_are_due_by_learner_steps_and_throughput_is_of_completions() -> None:
    head = LlmHead(llm(eval={"every": 10}, stop={"updates": 25}), wall_started=0.0)

    def actor(samples: int) -> dict[str, dict[str, Any]]:
        counters = ("tokens", "groups", "kept_groups", "passes", "scored", "unscored", "cut_off", "failed")
        return {"actor 0": dict.fromkeys(counters, 0) | {"samples": samples, "decode_s": samples / 100, "version": 1}}

    def learner(updates: int) -> dict[str, float]:
        return {"updates": updates, "version": 1, "update_s": float(updates)}

    head.tick(LlmTick(10.0, actor(0), learner=learner(0)))
    row = head.tick(LlmTick(11.0, actor(40), learner=learner(2)))
    assert row["time_s"] == 0.0  # the clock began with the first completion
    row = head.tick(LlmTick(13.0, actor(100), learner=learner(8)))
    assert (row["samples_per_s"], row["updates_per_s"], row["time_s"]) == (30.0, 3.0, 2.0)
    assert (row["time/actor/decode_s"], row["time/learner/update_s"]) == (1.0, 8.0)
    figures = {"seconds": 3.0, "pass_at_1": 0.25, "pass_at_1_error": 0.1, "greedy": 0.5, "prompts": 4.0}
    head.evaluated(LlmEvaluation(8, 1, figures))
    assert not head.evaluation_due()
    assert head.next_due == 10
    assert head.seconds_to_due() == pytest.approx((10 - 8) / 3.0)
    head.tick(LlmTick(14.0, actor(100), learner=learner(12)))
    assert [head.evaluation_due(), head.evaluation_due(), head.next_due] == [True, False, 20]
    assert head.stop_reason() is None
    head.tick(LlmTick(15.0, actor(100), learner=learner(25)))
    assert head.stop_reason() == "25 of 25 learner steps done"
    assert head.final_evaluation_due
