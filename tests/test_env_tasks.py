"""Tasks of control: listed, multiplied out, read and generated alike; names, stages, encodings, and when an episode passed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import envpool
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.env_tasks import EnvTask, make_env_tasks
from actors.task_schema import task_schema
from actors.task_set import TaskError, TaskSet
from configs.load import load_config
from configs.schema import EnvSettings, EnvTasksSettings
from configs.tasks import EnvTaskRow

GRID = "MiniGrid-Empty-Random-5x5-v0"
SIZES = (5, 6, 8, 16)
MINE = "tests.test_env_tasks"


def made(env: dict[str, Any] | None = None, /, **tasks: Any) -> TaskSet[EnvTask]:
    return make_env_tasks(
        EnvTasksSettings.model_validate(tasks), EnvSettings.model_validate({"id": GRID} | (env or {}))
    )


def refusal(env: dict[str, Any] | None = None, /, **tasks: Any) -> str:
    with pytest.raises(TaskError) as error:
        made(env, **tasks)
    return str(error.value)


def grids(count: int = 4, **more: Any) -> Iterator[dict[str, Any]]:
    """A generator, as a user writes one."""
    for size in SIZES[:count]:
        yield {"kwargs": {"size": size, "agent_start_pos": [1, 2]}, **more}


def rows_of_my_own() -> list[EnvTaskRow]:
    return [EnvTaskRow(id="CartPole-v1")]


def no_rows() -> list[dict[str, Any]]:
    return []


def numbers() -> list[int]:
    return [1, 2]


# -- where tasks come from --------------------------------------------------------------------------------------------


def test_list_product_file_and_generator_give_the_same_tasks(tmp_path: Path) -> None:
    rows = list(grids())
    lines, table = tmp_path / "tasks.jsonl", tmp_path / "tasks.parquet"
    lines.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    pq.write_table(pa.Table.from_pylist(rows), table)
    texts = tmp_path / "texts.parquet"
    pq.write_table(pa.Table.from_pylist([{"kwargs": json.dumps(row["kwargs"])} for row in rows]), texts)

    expected = list(made(product={"size": SIZES, "agent_start_pos": [(1, 2)]}, threshold=0.5))
    assert [task.kwargs for task in expected] == [{"size": size, "agent_start_pos": (1, 2)} for size in SIZES]
    for given_as in (
        {"list": rows},
        {"source": str(lines)},
        {"source": str(table)},
        {"source": str(texts)},
        {"source": f"{MINE}:grids"},
    ):
        assert list(made(threshold=0.5, **given_as)) == expected, given_as
    with_start = made({"kwargs": {"agent_start_pos": (1, 2)}}, product={"size": SIZES}, threshold=0.5)
    assert list(with_start) == expected, "what all tasks have in common may stand in env.kwargs"


def test_generators_take_arguments_and_give_rows_or_mappings() -> None:
    tasks = made(source=f"{MINE}:grids", kwargs={"count": 2, "threshold": 0.25, "family": "grid"})
    assert [(task.threshold, task.family) for task in tasks] == [(0.25, "grid")] * 2
    assert made(source=f"{MINE}:rows_of_my_own")[0].id == "CartPole-v1"


@given(
    st.lists(st.sampled_from(["CartPole-v1", "Acrobot-v1", GRID]), min_size=1, max_size=3, unique=True),
    st.dictionaries(
        st.sampled_from(["size", "max_episode_steps", "obstacle_type"]),
        st.lists(st.integers(1, 50) | st.sampled_from(["a", "b"]), min_size=1, max_size=4, unique=True),
        max_size=3,
    ),
)
def test_a_product_is_every_combination_once_the_last_argument_fastest(ids: list[str], values: dict[str, Any]) -> None:
    tasks = made(ids=ids, product=values, threshold=0.5)
    expected = [(id, dict(zip(values, chosen, strict=True))) for id in ids for chosen in product(*values.values())]
    assert [(task.id, task.kwargs) for task in tasks] == expected
    assert len({task.key for task in tasks}) == len({task.name for task in tasks}) == len(tasks)
    assert all(0 <= task.key < 2**63 for task in tasks)


def test_a_tasks_arguments_come_over_those_of_all() -> None:
    common = {"kwargs": {"size": 9, "max_episode_steps": 50}}
    first, second = made(common, list=[{}, {"kwargs": {"size": 6}}], threshold=0.5)
    assert first.kwargs == {"size": 9, "max_episode_steps": 50}
    assert second.kwargs == {"size": 6, "max_episode_steps": 50}
    settings = second.settings(EnvSettings(stack=4, backend="envpool"))
    assert settings == EnvSettings(id=GRID, stack=4, backend="envpool", kwargs={"size": 6, "max_episode_steps": 50})


def test_keys_are_of_id_and_arguments_alone() -> None:
    task = EnvTask("A-v0", {"b": 1, "a": (1.5, "x")}, "name", "family", 0)
    assert task.key == EnvTask("A-v0", {"a": (1.5, "x"), "b": 1}, "other", "other", 7, 1.0, "success", (1.0,)).key
    others = [("A-v1", {"b": 1, "a": (1.5, "x")}), ("A-v0", {"b": True, "a": (1.5, "x")}), ("A-v0", {"b": 1})]
    assert task.key not in {EnvTask(id, kwargs, "name", "family", 0).key for id, kwargs in others}
    assert task.key == 3_588_241_259_605_428_231, "the same in every process and release: checkpoints tell tasks by it"


# -- what rows leave out ----------------------------------------------------------------------------------------------


def test_names_are_short_and_tell_the_tasks_apart() -> None:
    def names(env: dict[str, Any] | None = None, /, **tasks: Any) -> list[str]:
        return [task.name for task in made(env, threshold=1.0, **tasks)]

    assert names(ids=["MetaWorld/Reach-v3", "CartPole-v1"]) == ["Reach-v3", "CartPole-v1"]
    assert names({"kwargs": {"size": 5}}, product={"max_episode_steps": [7], "size": [5, 6]}) == [
        f"{GRID} size=5",
        f"{GRID} size=6",
    ]
    assert names(
        list=[{}, {"kwargs": {"agent_start_pos": [1, 2], "see": True}}, {"name": "mine", "kwargs": {"size": 3}}]
    ) == [
        GRID,
        f"{GRID} agent_start_pos=1,2 see=True",
        "mine",
    ]
    assert names(ids=["CartPole-v1", "phys2d/CartPole-v1"]) == ["CartPole-v1", "phys2d.CartPole-v1"]
    rows = [{"name": "same"}, {"name": "same", "kwargs": {"size": 5}}, {"kwargs": {"size": 6}}]
    assert refusal(list=rows, threshold=1.0).startswith("2 tasks have the name 'same', and metrics go by names")


def test_families_and_stages() -> None:
    tasks = made(ids=["MetaWorld/Reach-v3", "CartPole-v1"])
    assert tasks.families == ("CartPole-v1", "Reach-v3")
    assert [(task.family, task.stage) for task in tasks] == [("Reach-v3", 0), ("CartPole-v1", 1)]
    assert [task.stage for task in made(list=[{"stage": 3}, {"stage": 0, "kwargs": {"size": 5}}], threshold=1.0)] == [
        3,
        0,
    ]
    assert "1 of the 2 tasks have a stage; give one to all" in refusal(
        list=[{"stage": 3}, {"kwargs": {"size": 5}}], threshold=1.0
    )
    many = made(ids=["CartPole-v1", "Acrobot-v1"], product={"max_episode_steps": list(range(1, 34))})
    assert [task.stage for task in many] == [0] * 33 + [1] * 33, "of many tasks a family is a stage"
    for count, last in ((64, 63), (65, 0)):
        assert made(product={"max_episode_steps": list(range(count))}, threshold=1.0)[-1].stage == last


def test_the_same_task_twice_is_refused() -> None:
    rows = [{"kwargs": {"size": 5, "max_episode_steps": 9}}, {"kwargs": {"size": 6}}, {"id": GRID, "name": "again"}]
    message = refusal({"kwargs": {"size": 6}}, list=rows, threshold=1.0)
    assert message.startswith("tasks.list.2: the same environment with the same arguments as tasks.list.1; leave one")
    assert "tasks.product, combination 1: the same environment" in refusal(product={"size": [5, 5]}, threshold=1.0)


# -- embeddings -------------------------------------------------------------------------------------------------------


def test_the_embedding_of_a_task_is_its_numeric_arguments() -> None:
    tasks = made(
        product={"size": [5, 7, 15], "agent_start_pos": [(1, 1), (3, 1)], "max_episode_steps": [9]},
        encoding="embedding",
        threshold=0.5,
    )
    starts = (-1.0, 1.0)  # of the position's first component: the second is the same for all
    assert [task.embedding for task in tasks] == [(start, size) for size in (-1.0, -0.6, 1.0) for start in starts]
    assert all(task.embedding is None for task in made(product={"size": [5, 6]}, threshold=0.5))


@pytest.mark.parametrize(
    "rows",
    [
        [{"id": "CartPole-v1"}, {"id": "Acrobot-v1"}],
        [{"kwargs": {"obstacle_type": "lava"}}, {"kwargs": {"obstacle_type": "wall"}}],
        [{}, {"kwargs": {"size": 5}}],
        [{"kwargs": {"agent_start_pos": [1]}}, {"kwargs": {"agent_start_pos": [1, 1]}}],
    ],
)
def test_tasks_that_numbers_do_not_tell_apart_need_embeddings_of_their_own(rows: list[dict[str, Any]]) -> None:
    assert "do not differ in numeric arguments" in refusal(list=rows, encoding="embedding", threshold=0.5)
    given_to = [row | {"embedding": [n, 0.5]} for n, row in enumerate(rows)]
    assert [task.embedding for task in made(list=given_to, encoding="embedding", threshold=0.5)] == [(0, 0.5), (1, 0.5)]
    one = [given_to[0], rows[1]]
    assert "1 of the 2 tasks have an embedding, of 2 numbers" in refusal(list=one, encoding="embedding", threshold=0.5)
    uneven = [given_to[0], rows[1] | {"embedding": [1]}]
    assert "of 1 or 2 numbers; give one of the same length" in refusal(list=uneven, encoding="embedding", threshold=0.5)


# -- when an episode has passed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "tasks", "threshold", "success"),
    [
        ({"id": "MetaWorld/Reach-v3"}, {}, None, "success"),
        ({"id": "FetchReach-v4"}, {}, None, "is_success"),
        ({"id": "MetaWorld/Reach-v3"}, {"success": "near_object"}, None, "near_object"),
        ({"id": "MetaWorld/Reach-v3"}, {"threshold": 7.0}, 7.0, None),
        ({"id": "MetaWorld/Reach-v3"}, {"success": "no_such_flag"}, 10.0, None),
        ({"id": "CartPole-v1"}, {}, 475.0, None),
        ({"id": "CartPole-v1", "kwargs": {"reward_threshold": 99.0}}, {}, 99.0, None),
        ({"id": "CartPole-v1", "backend": "gymnasium"}, {}, 475.0, None),
        ({"id": "CartPole-v1", "backend": "gymnasium"}, {"success": "won"}, None, "won"),
        ({"id": "CartPole-v1"}, {"success": "won"}, 475.0, None),
        ({"id": "my_module:make"}, {"success": "won"}, None, "won"),
        ({"id": "my_module:make"}, {"threshold": 0.0}, 0.0, None),
    ],
)
def test_a_task_knows_when_an_episode_of_it_has_passed(
    env: dict[str, Any], tasks: dict[str, Any], threshold: float | None, success: str | None
) -> None:
    """A return that is set comes first, then a flag, then the environment's own return."""
    (task,) = made(env, ids=[env["id"]], **tasks)
    assert (task.threshold, task.success) == (threshold, success)
    (task,) = made(env, list=[{"threshold": -2.0}], **tasks)
    assert (task.threshold, task.success) == (-2.0, None), "a row's own comes before all"


@pytest.mark.parametrize(
    ("env", "tasks", "parts"),
    [
        ({}, {}, ["nothing says when an episode of", "whose info has agent_pos, mission_id", "set tasks.threshold"]),
        ({"id": "Pusher-v5"}, {}, ["nor a reward_threshold"]),  # EnvPool's 0 stands for none
        ({"id": "WalkerWalk-v1"}, {"success": "won"}, ["neither the flag won nor a reward_threshold"]),
        ({"id": "MountainCar-v0", "backend": "gymnasium"}, {"ids": ["Pendulum-v1"]}, ["nothing says when"]),
        ({"id": "my_module:make"}, {}, ["nothing says when an episode of my_module:make has passed"]),
        ({"id": "CartPole-v9"}, {}, ["task 'CartPole-v9': env.id 'CartPole-v9' is unknown", "nearest: CartPole-v1"]),
        ({"id": GRID, "backend": "gymnasium"}, {"threshold": 1.0}, [f"env.id {GRID!r} is unknown to gymnasium"]),
    ],
)
def test_a_task_without_a_criterion_or_an_environment_is_refused(
    env: dict[str, Any], tasks: dict[str, Any], parts: list[str]
) -> None:
    message = refusal(env, **({"list": [{}]} if "ids" not in tasks else {}), **tasks)
    for part in parts:
        assert part in message


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{", "line 3: expected a JSON object"),
        (
            "5",
            "line 3: expected an object with keys among id, kwargs, name, family, stage, threshold, embedding, received 5",
        ),
        ('{"stag": 1}', "line 3: there is no key stag; did you mean stage? a task has id, kwargs"),
        ('{"id": 5}', "line 3: id: expected text, not empty, or None, received 5"),
        ('{"id": ""}', "line 3: id: expected text, not empty, or None, received ''"),
        ('{"stage": "1"}', "line 3: stage: expected a whole number from 0 to 1_000_000, or None [stage], received '1'"),
        ('{"stage": true}', "line 3: stage: expected a whole number"),
        ('{"stage": -1}', "line 3: stage: expected a whole number"),
        (
            '{"threshold": "high"}',
            "line 3: threshold: expected a number from -1e+12 to 1e+12, or None [reward], received",
        ),
        ('{"threshold": NaN}', "line 3: a task must be as in JSON: Out of range float"),
        ('{"embedding": [1, "2"]}', "line 3: embedding.1: expected a number from -1e+06 to 1e+06, received '2'"),
        ('{"embedding": []}', "line 3: embedding: expected a list of 1 to 4096 values"),
        ('{"kwargs": [1]}', "line 3: kwargs: expected names with values"),
        (
            '{"kwargs": {"a": {"b": 1}}}',
            "line 3: kwargs.a: expected true or false or a number or text or a list of these",
        ),
        (
            '{"kwargs": {"a": null}}',
            "line 3: kwargs.a: expected true or false or a number or text or a list of these, rec",
        ),
    ],
)
def test_a_wrong_row_of_a_file_is_named_with_its_line(tmp_path: Path, line: str, text: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"id": "CartPole-v1"}\n\n' + line)
    assert f"{path}, {text}" in refusal(source=str(path), threshold=1.0)


def test_wrong_sources(tmp_path: Path) -> None:
    assert "there is no file" in refusal(source=str(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "gave no tasks, expected at least one" in refusal(source=str(tmp_path / "empty.jsonl"))
    (tmp_path / "bad.parquet").write_text("no")
    assert "expected a Parquet file" in refusal(source=str(tmp_path / "bad.parquet"))
    pq.write_table(pa.table({"id": ["CartPole-v1", "CartPole-v1"], "kwargs": [None, "{"]}), tmp_path / "text.parquet")
    assert "row 2, kwargs: expected a JSON object" in refusal(source=str(tmp_path / "text.parquet"))
    assert "generator no.such:thing cannot be imported" in refusal(source="no.such:thing")
    message = refusal(source=f"{MINE}:no_rows", kwargs={"size": 3})
    assert message.startswith(f"generator {MINE}:no_rows with arguments {{'size': 3}}: ")
    assert "gave no tasks" in refusal(source=f"{MINE}:no_rows")
    assert f"generator {MINE}:numbers, task 0: expected an object with keys among id" in refusal(
        source=f"{MINE}:numbers"
    )


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["id", "kwargs", "stage", "embedding", "name"]) | st.text(max_size=3), inner, max_size=3
            )
        ),
        max_leaves=8,
    )
)
def test_no_row_ends_in_anything_but_a_task_or_a_message(tmp_path_factory: pytest.TempPathFactory, row: object) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_text(json.dumps(row))
    try:
        (task,) = made(source=str(path), threshold=1.0)
    except TaskError:
        return
    assert task.key


# -- the sets that come with Millrace ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "flag"),
    [("metaworld_mt10", 10, True), ("dm_control_walker", 3, False), ("dm_control_set", 7, False)],
)
def test_packaged_sets_have_environments_of_one_shape(name: str, count: int, flag: bool) -> None:
    config = load_config(name)
    tasks = make_env_tasks(config.tasks, config.env)
    assert len(tasks) == count
    assert {task.id for task in tasks} <= set(envpool.list_all_envs())
    assert {task.success for task in tasks} == ({"success"} if flag else {None})
    names = [field.name for field in task_schema(config.env, config.tasks, tasks).observations]
    assert "observation/task" in names


def test_mt10_is_the_ten_tasks_of_the_benchmark() -> None:
    """As in the environments' own list of them, Yu et al. 2020, arXiv 1910.10897, figure 6."""
    tasks = make_env_tasks((config := load_config("metaworld_mt10")).tasks, config.env)
    words = "reach push pick-place door-open drawer-open drawer-close button-press-topdown peg-insert-side window-open window-close"
    spelt = ["".join(word.title() for word in task.split("-")) + "-v3" for task in words.split()]
    assert [task.name for task in tasks] == spelt
    assert all(task.kwargs == {"partially_observable": False} for task in tasks), "goals are observed"
