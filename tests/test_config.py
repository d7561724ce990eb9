"""Settings: every field is described, every mistake ends in one message, and YAML goes round."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from configs.fields import Setting, nearest_path, walk
from configs.load import ConfigError, dump_config, find_config, load, load_config, load_run, nearest, settings_help
from configs.schema import RunConfig, Settings, setting
from configs.tasks import EnvTaskRow

PACKAGED = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
ALL = {s.path: s for s in walk(RunConfig)}
ROW = {s.path: s for s in walk(EnvTaskRow)}


class Plain(Settings):
    """One algorithm."""

    name: Literal["plain"] = setting("plain", "The algorithm.", unit="choice")
    rate: float = setting(0.1, "Step size.", unit="per update", gt=0.0, le=1.0)


class Fancy(Settings):
    """Another algorithm, with a setting of its own."""

    name: Literal["fancy"] = setting("fancy", "The algorithm.", unit="choice")
    heads: int = setting(2, "Number of heads.", unit="heads", ge=1, le=64)


class Tree(Settings):
    """A tree whose algorithm is one of two, as later algorithms will be."""

    seed: int = setting(0, "Seed.", unit="seed", ge=0, le=9)
    algorithm: Annotated[Plain | Fancy, Field(discriminator="name")] = Plain()


def refusal(path: str | Path | None, *flags: str, model: type[Settings] = RunConfig) -> str:
    """The message that refuses these settings."""
    with pytest.raises(ConfigError) as error:
        load(model, path, flags)
    return str(error.value)


def outcome(path: Path | None, flags: Sequence[str] = ()) -> RunConfig | str:
    """The config or the message; anything else that is raised fails the test."""
    try:
        return load_config(path, flags)
    except ConfigError as error:
        return str(error)


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


# -- the settings themselves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*ALL, *(f"tasks.list.{name}" for name in ROW)])
def test_every_setting_has_type_bound_unit_and_help(path: str) -> None:
    field = ALL.get(path) or ROW[path.removeprefix("tasks.list.")]
    assert field.kind in (bool, int, float, str, Literal, tuple, dict)
    assert field.unit
    assert field.info.description is not None
    assert re.fullmatch(r"\S.+\.", field.info.description), "the help is a sentence"
    names = {name for item in field.info.metadata for name in dir(item) if getattr(item, name, None) is not None}
    if field.kind in (int, float):
        assert names & {"ge", "gt"}
        assert names & {"le", "lt"}
    elif field.kind is str:
        assert names & {"min_length", "pattern"}
        assert "pattern" not in names or "allowed" in (field.info.json_schema_extra or ()), "in words too"  # type: ignore[operator]
    elif field.kind is tuple:
        assert {"min_length", "max_length"} <= names
        assert re.search(r"from -?\d|not empty|keys among", field.element), "the elements are bounded too"
    assert field.expected


def test_defaults_are_within_their_own_bounds() -> None:
    assert load_config(None) == RunConfig()


@pytest.mark.parametrize("path", PACKAGED, ids=lambda p: p.stem)
def test_packaged_configs_load_and_set_nothing_twice(path: Path) -> None:
    config: Any = load_run(path)
    assert (config.tasks.source if config.kind == "llm" else config.env_name.split()[0]) in path.read_text()


# -- values from files and flags --------------------------------------------------------------------------------------


def test_the_documented_command_line() -> None:
    flags = (
        "--actors.count 4 --actors.envs 64 --replay.shards 2 --env.id HalfCheetah-v4 --seed 1 --mode sync "
        "--stop.steps 300000"
    )
    config: Any = load_config("configs/pendulum_sac.yaml", flags.split())
    assert (config.actors.count, config.actors.envs, config.replay.shards) == (4, 64, 2)
    assert (config.env.id, config.seed, config.mode, config.stop.steps) == ("HalfCheetah-v4", 1, "sync", 300_000)
    assert config.algorithm.policy_lr == 1e-3, "what no flag names stays as the file has it"


@pytest.mark.parametrize(
    ("flags", "path", "value"),
    [
        ("--learners.compile", "learners.compile", True),
        ("--no-checkpoints.replay", "checkpoints.replay", False),
        ("--checkpoints.replay False", "checkpoints.replay", False),
        ("--checkpoints.replay=false", "checkpoints.replay", False),
        ("--actors.batch-size 4", "actors.batch_size", 4),
        ("--stop.mean_return -150", "stop.mean_return", -150.0),
        ("--stop.mean_return -1.5e2", "stop.mean_return", -150.0),
        ("--stop.steps None --stop.wall_s 5", "stop.steps", None),
        ("--stop.steps 3e5", "stop.steps", 300_000),
        ("--stop.steps 300_000", "stop.steps", 300_000),
        ("--algorithm.hidden 64 32 16", "algorithm.hidden", (64, 32, 16)),
        ("--algorithm.policy_lr 3e-4", "algorithm.policy_lr", 3e-4),
        ("--name 2024", "name", "2024"),
        ("--replay.tls_certificate a.pem --replay.tls_key a.key", "replay.tls_key", "a.key"),
        ("--replay.tls_certificate a.pem --replay.tls_key a.key", "replay.tls_authority", None),
        ("--seed 1 --seed 2", "seed", 2),
        ("--env.kwargs.size 3 --env.kwargs.rate 1e-3", "env.kwargs", {"size": 3, "rate": 1e-3}),
        ("--env.kwargs size=3 dark=true mode=a=b", "env.kwargs", {"size": 3, "dark": True, "mode": "a=b"}),
        ("--tasks.ids Reach-v3 1e3 5", "tasks.ids", ("Reach-v3", "1e3", "5")),
        ("--tasks.product.size 5 1e3 --tasks.product.on true", "tasks.product", {"size": (5, 1e3), "on": (True,)}),
        ("--tasks.product size=5,6 mode=a=b,c", "tasks.product", {"size": (5, 6), "mode": ("a=b", "c")}),
        ("--tasks.ids a --tasks.product none", "tasks.product", {}),
        ("--tasks.ids a --eval.tasks None", "eval.tasks", None),
        ("--tasks.source my.tasks:make --tasks.kwargs.count 5", "tasks.kwargs", {"count": 5}),
    ],
)
def test_flags(flags: str, path: str, value: object) -> None:
    found: Any = load_config(None, flags.split())
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_yaml_values(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "algorithm: {policy_lr: 3e-4, hidden: [8, 8]}\nstop: {steps: 1e6, wall_s: None}\n"
        "env: {kwargs: {rate: 3e-4, word: 'on', 1: x}}\n",
    )
    config: Any = load_config(path)
    assert config.algorithm.policy_lr == 3e-4
    assert config.algorithm.hidden == (8, 8)
    assert (config.stop.steps, config.stop.wall_s) == (1_000_000, None)
    assert config.env.kwargs == {"rate": 3e-4, "word": "on", "1": "x"}


def test_a_flag_adds_to_the_files_arguments_and_can_replace_them(tmp_path: Path) -> None:
    path = write(tmp_path, "env: {kwargs: {a: 1, b: 2}}")
    assert load_config(path, ["--env.kwargs.b", "3"]).env.kwargs == {"a": 1, "b": 3}
    assert load_config(path, ["--env.kwargs", "c=1"]).env.kwargs == {"c": 1}
    assert load_config(path, ["--env.kwargs", "none"]).env.kwargs == {}


def test_yaml_merge_keys_and_aliases(tmp_path: Path) -> None:
    path = write(tmp_path, "env: {kwargs: &k {a: 1, b: 2}}\nalgorithm: {hidden: [8]}\n")
    assert load_config(path).env.kwargs == {"a": 1, "b": 2}
    path = write(tmp_path, "eval: &e {episodes: 7, seed: 5}\nstop: {<<: *e, steps: 3}\n")
    message = refusal(path)
    assert "stop.episodes: no such setting; did you mean eval.episodes?" in message
    path = write(tmp_path, "env: {kwargs: {<<: {a: 1, b: 2}, b: 3}}\n")
    assert load_config(path).env.kwargs == {"a": 1, "b": 3}


def test_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "# nothing\n")) == RunConfig()


def test_short_names_find_the_packaged_file_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pendulum_sac", "pendulum_sac.yaml", "configs/pendulum_sac", "configs/pendulum_sac.yaml"):
        assert find_config(name).samefile(PACKAGED[0].parent / "pendulum_sac.yaml")
    (tmp_path / "pendulum_sac.yaml").write_text("seed: 5")
    assert load_config("pendulum_sac").seed == 5, "a file of one's own comes first"


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--actors.cuont 4", ["actors.cuont: no such setting", "did you mean actors.count?", "flag --actors.cuont"]),
        ("--actor.count 4", ["actor.count: no such setting", "did you mean actors.count?"]),
        ("--envs 4", ["envs: no such setting", "did you mean actors.envs?"]),
        ("--xyzzy", ["xyzzy: no such setting", "the top level has name, root, seed"]),
        ("--actors.count 0", ["actors.count: expected a whole number from 1 to 100_000 [processes], got '0'"]),
        ("--actors.count 1.5", ["actors.count: expected a whole number", "got '1.5'"]),
        ("--actors.count inf", ["actors.count: expected a whole number", "got 'inf'"]),
        ("--actors.count true", ["actors.count: expected a whole number", "got 'true'"]),
        ("--actors.count", ["actors.count: expected a whole number", "got no value"]),
        ("--actors.count 1 2", ["actors.count: expected a whole number", "got 2 words (1 2)"]),
        ("--actors.count None", ["actors.count: expected a whole number"]),
        ("--no-actors.count", ["actors.count: is no switch", "flag --no-actors.count"]),
        ("--actors 4", ["actors: expected a group of settings (actors.count, actors.envs"]),
        ("--seed.x 4", ["seed: expected a whole number"]),
        ("--algorithm.discount nan", ["algorithm.discount: expected a number from 0 to 1 [per step], got 'nan'"]),
        ("--algorithm.polyak 0", ["algorithm.polyak: expected a number above 0 and at most 1 [share]"]),
        ("--algorithm.hidden", ["algorithm.hidden: expected a list of 1 to 16 values"]),
        ("--algorithm.hidden 8 0", ["algorithm.hidden.1: expected a whole number from 1 to 65_536, got '0'"]),
        (
            "--algorithm.name sca",
            ["algorithm.name: expected one of sac, flow, dqn, r2d2, custom, got 'sca'; did you mean sac?"],
        ),
        ("--mode synch", ["mode: expected one of cluster, sync, got 'synch'; did you mean sync?"]),
        ("--learners.compile maybe", ["learners.compile: expected true or false, got 'maybe'"]),
        (
            "--algorithm.epsilon 0.1",
            [
                "algorithm.epsilon: is a setting of algorithm.name dqn, r2d2; set algorithm.name, or leave it out "
                "(flag --algorithm.epsilon)"
            ],
        ),
        ("--algorithm.recurent 8", ["algorithm.recurent: no such setting"]),
        (
            "--algorithm.name dqn --algorithm.polyak 1",
            ["algorithm.polyak: is a setting of algorithm.name sac, flow; set"],
        ),
        ("--learners.device gpu", ["learners.device: expected auto, cpu, cuda or cuda:<index>, got 'gpu'"]),
        ("--env.id=", ["env.id: expected text, not empty, got ''"]),
        ("--env.kwargs size", ["env.kwargs: expected NAME=VALUE …, or none, got 'size'"]),
        ("--env.kwargs.a 1 --env.kwargs b=2", ["env.kwargs.a: contradicts --env.kwargs"]),
        ("extra --seed 1", ["extra: unexpected word"]),
        ("--seed -1 --actors.count 0", ["seed: expected", "actors.count: expected"]),
    ],
)
def test_a_wrong_flag_is_named_with_what_is_allowed(flags: str, parts: list[str]) -> None:
    message = refusal(None, *flags.split())
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("seed: 1\nactors:\n  cuont: 4\n", ["actors.cuont: no such setting; did you mean actors.count?", ":3)"]),
        ("actor:\n  count: 4\n", ["actor: no such setting; did you mean actors?", ":1)"]),
        ("seed: 1\nseed: 2\n", ["seed: given twice, on lines 1 and 2"]),
        ("actors:\n  envs: true\n", ["actors.envs: expected a whole number", "got true", ":2)"]),
        ("actors:\n  cpus: true\n", ["actors.cpus: expected a number", "got true"]),
        ("algorithm:\n  hidden: [8, true]\n", ["algorithm.hidden", "whole number"]),
        ("algorithm:\n  hidden: 8\n", ["algorithm.hidden: expected a list of 1 to 16 values", "got 8"]),
        ("env:\n", ["env: expected a group of settings", "got nothing (null)"]),
        ("seed:\n", ["seed: expected a whole number", "got nothing (null)", ":1)"]),
        ("env: {id: 5}\n", ["env.id: expected text, not empty, got 5; put it in quotes"]),
        (
            "env: {kwargs: {a: {b: 1}}}\n",
            ["env.kwargs.a: expected true or false or a number or text or a list of these, got a"],
        ),
        ("tasks: {ids: [5]}\n", ["tasks.ids.0: expected text, not empty, got 5"]),
        ("tasks: {ids: a}\n", ["tasks.ids: expected a list of 0 to 10000 values, each text, not empty", "got 'a'"]),
        ("tasks: {product: {size: 5}}\n", ["tasks.product.size: expected a list of 1 to", "got 5", ":1)"]),
        ("tasks: {product: {size: []}}\n", ["tasks.product.size: expected a list of 1 to", "got []"]),
        ("tasks: {product: {size: [{}]}}\n", ["tasks.product.size: expected a list of 1 to", "got a mapping"]),
        (
            "tasks: {list: [a]}\n",
            ["tasks.list.0: expected a mapping with keys among id, kwargs", "got 'a'"],
        ),
        ("tasks: {list: {id: a}}\n", ["tasks.list: expected a list", "got a mapping"]),
        (
            "tasks:\n  list:\n    - id: a\n    - id: b\n      stag: 3\n",
            ["tasks.list.1.stag: no such setting; did you mean tasks.list.1.stage? tasks.list.1 has id, kwargs", ":5)"],
        ),
        (
            "tasks:\n  list:\n    - id: a\n    - stage: -1\n",
            ["tasks.list.1.stage: expected a whole number from 0 to 1_000_000, or None [stage], got -1", ":4)"],
        ),
        ("tasks:\n  list:\n    - stage: true\n", ["tasks.list.0.stage: expected a whole number", "got true", ":3)"]),
        ("tasks: {list: [{embedding: [1, x]}]}\n", ["tasks.list.0.embedding.1: expected a number from", "got 'x'"]),
        ("tasks: {list: [{kwargs: {a: {}}}]}\n", ["tasks.list.0.kwargs.a: expected true or false", "got a mapping"]),
        ("env: {kwargs: {a: }}\n", ["env.kwargs.a: expected", "got nothing (null)"]),
        ("name: 2026-01-01\n", ["name: expected up to 100 letters", "got 2026-01-01"]),
        ("5\n", ["expected settings such as 'seed: 1'", "got 5"]),
        ("seed: [1\n", ["not valid YAML", "run.yaml:2"]),
        ("seed: 1\n\tx: 2\n", ["not valid YAML", "run.yaml:2"]),
        ("seed: !!python/object/apply:os.getcwd []\n", ["not valid YAML", "line 1: unknown tag"]),
        ("seed: !!python/name:os.getcwd x\n", ["not valid YAML", "run.yaml:1", "could not determine"]),
        ("seed: !!int x\n", ["not valid YAML"]),
        ("seed: 2026-13-45\n", ["not valid YAML"]),
        ("seed: &a [*a]\n", ["not valid YAML", "contains itself"]),
        ("seed: 1\n---\nseed: 2\n", ["not valid YAML"]),
        ("[" * 5000, ["not valid YAML"]),
        ("seed: \x00\n", ["not valid YAML"]),
    ],
)
def test_a_wrong_file_is_named_with_its_line(tmp_path: Path, text: str, parts: list[str]) -> None:
    message = refusal(write(tmp_path, text))
    assert str(tmp_path / "run.yaml") in message
    for part in parts:
        assert part in message


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"seed: \xff\xfe\x80")
    assert "not valid YAML" in refusal(path)


def test_a_missing_file_names_the_configs_there_are() -> None:
    message = refusal("pendulum")
    assert "pendulum: no such config file; did you mean pendulum_sac?" in message
    assert all(path.stem in message for path in PACKAGED)
    assert "no such config file" in refusal("/nowhere/pendulum_sac.yaml"), "an explicit folder is not second-guessed"


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("--actors.batch_size 9", "actors.batch_size (9) must not exceed actors.envs (8)"),
        ("--mode sync --actors.batch_size 4", "mode sync (lock step) rules out"),
        ("--mode sync --address auto", "address names a Ray cluster"),
        ("--replay.segment_steps 131072", "replay.capacity (1000000) is too small"),
        ("--replay.min_size 600000", "must not exceed half of replay.capacity"),
        (
            "--algorithm.target.kind n_step --algorithm.target.length 256",
            "windows of 256 steps (algorithm.target.length) must be shorter than replay.segment_steps (256)",
        ),
        (
            "--algorithm.name r2d2 --algorithm.sequence 300",
            "windows of 308 steps (algorithm.burn_in + algorithm.sequence) must be shorter than replay.segment_steps (256)",
        ),
        ("--algorithm.head.kind c51 --algorithm.head.bins 402", "must not exceed algorithm.head.max_bins (401) where"),
        (
            "--algorithm.head.low -1 --algorithm.head.high 1",
            "are the ends of bins, which algorithm.head.kind mse has none of; leave them out, or take two_hot, hl_gauss",
        ),
        (
            "--algorithm.name r2d2 --algorithm.chain.length 2 --algorithm.chain.policy_value one",
            "algorithm.chain.policy_value one has no effect with algorithm.name r2d2",
        ),
        (
            "--mode cluster --learners.device cuda:1",
            "learners.device cuda:1 names one GPU, and in mode cluster Ray gives",
        ),
        (
            "--learners.batch_size 255 --learners.count 2",
            "learners.batch_size (255) must be a multiple of learners.count",
        ),
        ("--algorithm.head.kind c51 --learners.count 2", "learners.count (2) needs a value head whose range is fixed"),
        ("--mode sync --learners.count 2", "learners.count (2) must be 1 in mode sync"),
        (
            "--learners.batch_size 4 --prior.source data --prior.share 0.1",
            "prior.share (0.1) of the 4 windows that each learner takes",
        ),
        ("--prior.source data --replay.selector prioritised", "replay.selector prioritised would weigh the two parts"),
        ("--replay.tls_certificate a.pem", "replay.tls_certificate is set and replay.tls_key is not; set both"),
        ("--replay.tls_key a.key", "replay.tls_key is set and replay.tls_certificate is not; set both"),
        ("--replay.tls_authority ca.pem", "replay.tls_authority is set and the shards serve without TLS"),
        ("--eval.every 0 --stop.mean_return 1", "eval.every is 0; set eval.every"),
        (
            "--tasks.ids a --eval.every 0 --stop.success 0.5",
            "stop.success is measured by evaluations, and eval.every is 0",
        ),
        ("--stop.success 0.5", "stop.success is a share of passed episodes, and only tasks say when one has"),
        (
            "--tasks.ids a --tasks.source a.jsonl",
            "tasks.ids and tasks.source each say what the tasks are, expected one",
        ),
        ("--tasks.product a=1 --tasks.source a.jsonl", "tasks.product and tasks.source each say what the tasks are"),
        ("--tasks.threshold 5", "tasks.threshold is set and there are no tasks; set one of tasks.ids"),
        ("--curriculum.draw band", "curriculum.draw is set and there are no tasks to draw; set one"),
        ("--tasks.source a.jsonl --tasks.kwargs a=1", "tasks.kwargs are a generator's, and tasks.source names none"),
        ("--tasks.ids a --curriculum.low 0.9", "curriculum.low (0.9) must not exceed curriculum.high (0.8)"),
        (
            "--tasks.ids a --curriculum.group_size 2 --curriculum.low 0.6 --curriculum.filter band",
            "curriculum.filter band keeps no group: with groups of 2",
        ),
        (
            "--tasks.ids a --actors.batch_size 4",
            "actors.batch_size (4) below actors.envs (8) steps in completion order, and",
        ),
        ("--tasks.ids a --prior.source data", "prior.source holds steps that do not say which task they are of"),
        ("--stop.steps None", "one of stop.steps, stop.wall_s, stop.mean_return and stop.success must be set"),
    ],
)
def test_an_impossible_combination_says_where_its_parts_come_from(flags: str, text: str) -> None:
    message = refusal(None, *flags.split())
    assert text in message
    assert f"flag {flags.split()[-2]}" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    "flags",
    [
        "--mode sync --learners.device cuda:1",
        "--algorithm.head.kind c51 --algorithm.head.bins 402 --algorithm.head.low 0 --algorithm.head.high 9",
        "--algorithm.head.bins 402",  # of no use, and in nobody's way
        "--algorithm.chain.length 2 --algorithm.chain.policy_value one",
        "--tasks.ids a b --tasks.product.size 5 6 --actors.batch_size 8",
        "--tasks.source my.tasks:make --tasks.kwargs a=1 --stop.steps None --stop.success 1",
        "--tasks.ids a --curriculum.draw my.own:Class --curriculum.kwargs a=1",
    ],
)
def test_what_can_run_is_not_refused(flags: str) -> None:
    assert isinstance(outcome(None, flags.split()), RunConfig)


def test_all_conflicts_are_listed_at_once() -> None:
    message = refusal(None, *["--mode", "sync", "--address", "auto", "--actors.batch_size", "9"])
    assert len(message.splitlines()) == 3


@given(
    st.lists(st.text(max_size=12) | st.sampled_from([f"--{p}" for p in ALL] + ["--no-seed", "-1", "None"]), max_size=6)
)
def test_no_command_line_ends_in_anything_but_a_config_or_a_message(flags: list[str]) -> None:
    assert outcome(None, flags)


@given(st.text(max_size=60) | st.text("seda: []{}&*!<|>-#'\"1\n ", max_size=40))
def test_no_file_ends_in_anything_but_a_config_or_a_message(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(text.encode(errors="surrogatepass"))
    assert outcome(path)


# -- tasks ------------------------------------------------------------------------------------------------------------

TASKS = """
env:
  id: Grid-v0
  kwargs: {start: [1, 2]}
tasks:
  encoding: embedding
  list:
    - {kwargs: {size: 5, goal: [1, 3e-4], "on": true}, family: small, stage: 0, embedding: [0, 1.5]}
    - {id: a/Other-v0, name: "2024", threshold: 3e2, embedding: [1, 2]}
"""


def test_tasks_in_a_file_go_round(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, TASKS))
    first, second = config.tasks.list
    assert first == EnvTaskRow(
        kwargs={"size": 5, "goal": (1, 3e-4), "on": True}, family="small", stage=0, embedding=(0.0, 1.5)
    )
    assert (second.id, second.name, second.threshold) == ("a/Other-v0", "2024", 300.0)
    assert config.env.kwargs == {"start": (1, 2)}
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    assert "--tasks.list (default: {kwargs=size=5 goal=1,0.0003 on=True family=small" in settings_help(config)


def test_a_run_has_tasks_where_something_says_which(tmp_path: Path) -> None:
    plain = load_config(None)
    assert not plain.has_tasks
    assert plain.env_name == "Pendulum-v1"
    for flags, name in (
        ("--tasks.ids a", "a"),
        ("--tasks.ids a b c", "a and 2 more"),
        ("--env.id x --tasks.product size=1,2", "x"),
        ("--tasks.source my.jsonl", "my.jsonl"),
    ):
        config = load_config(None, flags.split())
        assert config.has_tasks
        assert config.env_name == name
    listed = write(tmp_path, TASKS)
    assert load_config(listed).env_name == "Grid-v0 and 1 more"
    assert load_config(listed, ["--tasks.list", "--tasks.ids", "a"]).tasks.list == (), "no words, no rows"


def test_flags_do_not_reach_into_a_list_of_tasks(tmp_path: Path) -> None:
    path = write(tmp_path, TASKS)
    assert refusal(path, "--tasks.list.0.stage", "3").startswith(
        "tasks.list.0.stage: is within a list that the file gives"
    )
    assert refusal(None, "--tasks.list", "a").startswith("tasks.list: is a list of mappings, which flags cannot give")


def test_more_tasks_than_there_may_be_are_refused_before_they_are_made() -> None:
    values = [str(n) for n in range(1001)]
    message = refusal(None, "--tasks.product.a", *values, "--tasks.product.b", *values)
    assert message.startswith("tasks.product and tasks.ids make 1002001 tasks, expected at most 1000000; leave some")


# -- several algorithms behind one key --------------------------------------------------------------------------------


def test_the_name_decides_which_algorithms_settings_are_allowed(tmp_path: Path) -> None:
    assert load(Tree, None, ["--algorithm.rate", "0.5"]).algorithm == Plain(rate=0.5)
    flags = ["--algorithm.heads", "3", "--algorithm.name", "fancy"]
    assert load(Tree, None, flags).algorithm == Fancy(heads=3)
    path = write(tmp_path, "algorithm:\n  name: fancy\n  heads: 4\n")
    assert load(Tree, path).algorithm == Fancy(heads=4)
    assert load(Tree, path, ["--algorithm.heads", "5"]).algorithm == Fancy(heads=5)
    assert dump_config(load(Tree, path)) == "seed: 0\nalgorithm:\n  name: fancy\n  heads: 4\n"


def test_mistakes_in_a_union_name_the_setting_and_not_the_member(tmp_path: Path) -> None:
    path = write(tmp_path, "algorithm:\n  name: fancy\n  heads: 0\n")
    assert refusal(path, model=Tree).startswith("algorithm.heads: expected a whole number from 1 to 64 [heads], got 0")
    assert "algorithm.rate: is a setting of algorithm.name plain; set" in refusal(
        path, "--algorithm.rate", "1", model=Tree
    )
    message = refusal(path, "--algorithm.name", "fanci", model=Tree)
    assert message.startswith("algorithm.name: expected one of plain, fancy, got 'fanci'; did you mean fancy?")
    assert "one of plain, fancy" in settings_help(Tree())
    assert "--algorithm.heads (default: 4)" in settings_help(
        load(Tree, None, ["--algorithm.name", "fancy", "--algorithm.heads", "4"])
    )


# -- text -------------------------------------------------------------------------------------------------------------

scalars = st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text(max_size=8)


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=6), scalars | st.sampled_from(["3e-4", "1e6", "on", "null"]), max_size=4
    ),
    st.lists(st.integers(1, 65_536), min_size=1, max_size=4),
)
def test_yaml_round_trip(tmp_path_factory: pytest.TempPathFactory, kwargs: dict[str, Any], hidden: list[int]) -> None:
    config = RunConfig.model_validate(
        {"env": {"kwargs": kwargs}, "algorithm": {"name": "sac", "hidden": hidden}, "name": "2024"}
    )
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


def test_dump_is_plain_yaml() -> None:
    config = load_config("pendulum_sac")
    data = yaml.safe_load(dump_config(config))
    assert data["algorithm"]["hidden"] == [128, 128]
    assert RunConfig.model_validate(data) == config


def test_help_names_every_setting_and_fits_80_columns() -> None:
    config = load_config("pendulum_sac", ["--actors.envs", "16"])
    text = settings_help(config)
    assert max(map(len, text.splitlines())) <= 80
    flat = " ".join(text.split())
    for field in walk(RunConfig, config):
        assert f"--{field.path} (default:" in flat
        assert f"{field.info.description} Takes {field.expected} [{field.unit}]." in flat
    assert "--actors.envs (default: 16)" in flat
    assert "--stop.mean_return (default: -200.0)" in flat
    assert "--algorithm.hidden (default: 128 128)" in flat


def test_nearest() -> None:
    assert nearest("pendulum", ["pendulum_sac", "halfcheetah_sac"]) == "pendulum_sac"
    assert nearest("xyzzy", ["pendulum_sac"]) is None
    assert nearest_path("learner.batch_size", ALL) == "learners.batch_size"
    assert nearest_path("replay.count", ALL) == "learners.count"
    assert nearest_path("kapacity", ALL) == "replay.capacity"


def test_annotations_are_read_once_through_optional() -> None:
    field = Setting("stop.steps", ALL["stop.steps"].info)
    assert field.optional
    assert field.kind is int
    assert get_args(ALL["mode"].type) == ALL["mode"].choices


def test_reading_settings_loads_nothing_heavy() -> None:
    """A command must say what is wrong with it at once: no torch, ray or matplotlib behind the settings."""
    code = (
        "import sys, configs.load as c; c.load_config('pendulum_sac', ['--seed', '1']);"
        "print(sorted({'torch', 'ray', 'numpy', 'pyarrow', 'matplotlib', 'envpool'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# -- what follows from several settings -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "draw", "draws", "own", "buffer"),
    [
        ("", 256, 8, 256, 100),
        ("--learners.updates_per_call 3", 768, 3, 256, 100),
        ("--learners.updates_per_call 64", 64 * 256, 1, 256, 64 + 64 + 64),
        ("--learners.count 4", 64, 8, 256, 100),
        ("--learners.count 4 --prior.source data --prior.share 0.25", 48, 8, 192, 100),
        ("--learners.updates_per_call 64 --prior.source data", 128, 8, 128, 64 + 64 + 8),
    ],
)
def test_draws_follow_from_updates_per_call_learners_and_prior_data(
    flags: str, draw: int, draws: int, own: int, buffer: int
) -> None:
    """Each learner draws the windows of a whole call at once, but beside a dataset; the pace counts the run's own alone."""
    config = load_config(None, flags.split())
    assert (config.draw_size, config.prefetch_draws, config.replay_windows) == (draw, draws, own)
    assert config.samples_per_insert == own
    assert config.error_buffer == buffer
