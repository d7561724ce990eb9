"""Tasks from generators and files; countdown and arithmetic; the expression parser against a reference that shares nothing with it."""

from __future__ import annotations

import ast
import json
import operator
import random
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.llm import arithmetic, countdown
from actors.llm.expressions import MOST_CHARACTERS, MOST_DEPTH, ExpressionError, parse
from actors.llm.tasks import Task, TaskError, make_tasks
from actors.task_set import TaskSet
from configs.llm import TasksSettings

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def reference(text: str) -> Fraction | None:
    """The value of an expression by Python's own parser; None where it is none."""
    if not set(text) <= set("0123456789+-*/() ") or "**" in text.replace(" ", "") or "//" in text.replace(" ", ""):
        return None

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant):
            if not isinstance(node.value, int):
                raise ValueError
            return Fraction(node.value)
        if not isinstance(node, ast.BinOp):
            raise ValueError
        return Fraction(OPERATORS[type(node.op)](value(node.left), value(node.right)))

    try:
        return value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def numbers_in(text: str) -> list[int]:
    return [int(part) for part in "".join(c if c.isdigit() else " " for c in text).split()]


def value_of(text: str) -> Fraction | None:
    try:
        return Fraction(parse(text).value)
    except ExpressionError:
        return None


# Python takes no leading zeros, so that numbers here have none.
TERMS = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.tuples(inner, st.sampled_from(["+", "-", "*", "/", " + "]), inner, st.booleans()).map(
        lambda parts: f"({''.join(parts[:3])})" if parts[3] else "".join(parts[:3])
    ),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None)
@given(TERMS)
def test_expressions_have_the_value_that_python_gives_them(text: str) -> None:
    assert value_of(text) == reference(text)
    if value_of(text) is not None:
        assert parse(text).numbers == numbers_in(text)


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet="1230+-*/() ", max_size=12))
def test_any_text_of_those_characters_is_judged_alike(text: str) -> None:
    python = reference(text)
    if python is None and any(len(part) > 1 and part[0] == "0" for part in text.replace("(", " ").split()):
        return  # leading zeros are no syntax for Python
    if any(
        digits.startswith("0") and len(digits) > 1
        for digits in "".join(c if c.isdigit() else " " for c in text).split()
    ):
        return
    assert value_of(text) == python


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "ends where a number should be"),
        ("1+", "ends where a number should be"),
        ("-1", "'-' stands where"),
        ("2**3", r"'\*' stands where"),
        ("1 2", "'2' comes after"),
        ("(1", "not closed"),
        ("1)", r"'\)' comes after"),
        ("()", r"'\)' stands where"),
        ("1/0", "divides by zero"),
        ("1/(2-2)", "divides by zero"),
        ("2^3", r"'\^' is neither"),
        ("1e9", "'e' is neither"),
        ("1.5", r"'\.' is neither"),
        ("٣+4", "'٣' is neither"),
        ("²", "'²' is neither"),
        ("1\x00", "neither"),
        ("__import__('os')", "'_' is neither"),
        ("9" * 13, "more than 12 digits"),
        ("1+" * 200 + "1", f"more than {MOST_CHARACTERS} characters"),
        ("(" * 100 + "1" + ")" * 100, f"more than {MOST_DEPTH} deep"),
    ],
)
def test_what_is_no_expression_says_why(text: str, message: str) -> None:
    with pytest.raises(ExpressionError, match=message):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "(" * 10**6,
        "9" * 10**6,
        "9**9**9**9",
        "*".join(["999999999999"] * 19),
        "1/" * 127 + "1",
        "(" * 120 + ")" * 120,
        "\ud800",
    ],
)
def test_hostile_text_gets_a_verdict_at_once(text: str) -> None:
    began = time.perf_counter()
    assert not countdown.verify(text, {"numbers": [9], "target": 9}).passed
    assert time.perf_counter() - began < 0.2


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("3*7+25", ""),
        (" 25 + 3 * 7\n", ""),
        ("(25+(7*3))", ""),
        ("3*7+25=46", "not an expression: '=' is neither a digit, an operator nor a parenthesis"),
        ("25+21", "uses 21, which is not given"),
        ("3*7+25+7-7", "uses 7 3 times, given once"),
        ("3*7+25*3/3", "uses 3 3 times, given once"),
        ("7+25", "does not use 3"),
        ("25*7/3", "uses /, which is not allowed"),
        ("3+7+25", "makes 35, not 46"),
    ],
)
def test_countdown_verdicts(completion: str, reason: str) -> None:
    verdict = countdown.verify(completion, {"numbers": [3, 7, 25], "target": 46, "operators": "+-*"})
    assert (verdict.passed, verdict.reward, verdict.reason) == (not reason, float(not reason), reason)


def test_countdown_counts_a_number_as_often_as_it_is_given_and_divides_exactly() -> None:
    assert countdown.verify("5+5", {"numbers": [5, 5], "target": 10}).passed
    assert countdown.verify("5", {"numbers": [5, 5], "target": 5}).reason == "uses 5 only once"
    assert countdown.verify("1/3*6", {"numbers": [1, 3, 6], "target": 2}).passed
    assert countdown.verify("7/2", {"numbers": [7, 2], "target": 3}).reason == "makes 7/2, not 3"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**63), st.integers(2, 6), st.booleans(), st.randoms(use_true_random=False))
def test_countdown_solutions_pass_and_mutations_are_judged_as_by_python(
    seed: int, size: int, division: bool, generator: random.Random
) -> None:
    for task in countdown.generate(5, seed, low=size, high=size, division=division, largest=30):
        assert task.solution is not None
        assert task.prompt == f"{','.join(map(str, task.data['numbers']))}={task.data['target']}:"
        assert countdown.verify(task.solution, task.data).passed
        allowed = set("+-*/" if division else "+-*")
        for _ in range(20):
            text = list(task.solution)
            for _ in range(generator.randint(1, 2)):
                text[generator.randrange(len(text))] = generator.choice("0123456789+-*/()")
            mutated = "".join(text)
            if any(
                part[0] == "0" and len(part) > 1 for part in "".join(c if c.isdigit() else " " for c in mutated).split()
            ):
                continue
            expected = (
                reference(mutated) == task.data["target"]
                and Counter(numbers_in(mutated)) == Counter(task.data["numbers"])
                and set(mutated) & set("+-*/") <= allowed
            )
            assert countdown.verify(mutated, task.data).passed == expected, mutated


def test_countdown_prompts_are_distinct_balanced_repeatable_and_quick() -> None:
    began = time.process_time()
    tasks = countdown.generate(20_000, 7, largest=99)
    assert time.process_time() - began < 3.0  # 0.4 s on an idle core
    assert len({task.prompt for task in tasks}) == 20_000
    assert Counter(task.family for task in tasks) == {"2 numbers": 10_000, "3 numbers": 10_000}
    assert countdown.generate(100, 7, largest=99) == tasks[:100]
    assert countdown.generate(100, 8, largest=99) != tasks[:100]
    for task in tasks:
        assert all(1 <= number <= 99 for number in task.data["numbers"])
        assert 1 <= task.data["target"] <= 999
    assert max(len(str(task.solution)) for task in countdown.generate(2000, 0, high=5)) <= 20


def test_a_family_that_is_used_up_is_left_to_the_others() -> None:
    """The puzzles of two numbers up to 5, in any order, can be counted."""
    every = {
        (min(a, b), max(a, b), target)
        for a, b in product(range(1, 6), repeat=2)
        for target in (a + b, a - b, b - a, a * b)
        if target >= 1
    }
    tasks = countdown.generate(300, 0, largest=5)
    families = Counter(task.family for task in tasks)
    assert families["2 numbers"] == len(every)
    assert families["3 numbers"] == 300 - len(every)
    with pytest.raises(TaskError, match=f"only {len(every)} distinct puzzles, expected 300"):
        countdown.generate(300, 0, low=2, high=2, largest=5)


@pytest.mark.parametrize(
    ("largest", "text"), [(30, "1 364 distinct puzzles of two numbers up to 30"), (99, "11 411 of two up to 99")]
)
def test_the_documented_number_of_puzzles_is_right(largest: int, text: str) -> None:
    pairs = product(range(1, largest + 1), repeat=2)
    count = len({(a, b, t) for a, b in pairs if a <= b for t in (a + b, b - a, a * b) if 1 <= t <= 999})
    assert text.startswith(f"{count // 1000} {count % 1000:03d} ")
    assert text in " ".join((countdown.generate.__doc__ or "").split())


@pytest.mark.parametrize("kwargs", [{"low": 1}, {"low": 4}, {"high": 9}, {"largest": 0}, {"largest_target": 0}])
def test_countdown_names_arguments_out_of_range(kwargs: dict[str, int]) -> None:
    with pytest.raises(TaskError, match=r"countdown needs .* received"):
        countdown.generate(1, 0, **kwargs)  # type: ignore[arg-type]


def test_no_puzzle_is_held_out_that_is_learnt_from_in_another_order() -> None:
    for kwargs in ({"low": 2, "high": 5, "largest": 30, "largest_target": 99}, {"largest": 12}):
        train, held = make_tasks(TasksSettings(kwargs=kwargs, count=1200), seed=3, held_out=200)

        def puzzles(tasks: TaskSet[Task]) -> set[tuple[tuple[int, ...], int]]:
            return {(tuple(sorted(task.data["numbers"])), task.data["target"]) for task in tasks}

        assert len(puzzles(train)) == 1200
        assert len(puzzles(held)) == 200
        assert not puzzles(train) & puzzles(held)


def test_arithmetic() -> None:
    tasks = arithmetic.generate(4000, 3, low=1, high=3, operators="+-*")
    assert len({task.prompt for task in tasks}) == 4000
    counts = Counter(task.family for task in tasks)
    assert counts["1 digit"] == 210  # all there are: 55 sums, 55 products and 100 differences
    assert abs(counts["2 digits"] - counts["3 digits"]) <= 1
    for task in tasks:
        assert str(reference(task.prompt.removesuffix("="))) == task.solution == task.data["answer"]
        digits = max(len(str(number)) for number in numbers_in(task.prompt))
        assert task.family == ("1 digit" if digits == 1 else f"{digits} digits")
        assert arithmetic.verify(task.solution, task.data).passed
        wrong = arithmetic.verify(str(int(task.solution) + 1), task.data)
        assert wrong.reason == f"says {int(task.solution) + 1}, not {task.solution}"
    for text in ("", "12a", "1 2", "--1", "1.0", "１２", "9" * 10**6):
        assert arithmetic.verify(text, {"answer": 12}).reason.startswith("not an integer")
    assert arithmetic.verify(" -012\n", {"answer": "-12"}).passed
    for kwargs in ({"low": 0}, {"high": 19}, {"operators": "/"}, {"operators": ""}):
        with pytest.raises(TaskError, match=r"arithmetic needs .* received"):
            arithmetic.generate(1, 0, **kwargs)  # type: ignore[arg-type]


def tasks_of(source: str, held_out: int = 0, seed: int = 0, **more: Any) -> tuple[TaskSet[Task], TaskSet[Task]]:
    return make_tasks(TasksSettings(source=source, **more), seed=seed, held_out=held_out)


@pytest.mark.parametrize("source", ["countdown", "arithmetic"])
def test_held_out_prompts_are_others_and_do_not_depend_on_the_count(source: str) -> None:
    training, held = tasks_of(source, 64, count=500)
    assert (len(training), len(held)) == (500, 64)
    assert not {task.prompt for task in training} & {task.prompt for task in held}
    sizes = {len(held.of(family)) for family in held.families}
    assert len(sizes) == 1
    more, same = tasks_of(source, 64, count=700)
    assert list(same) == list(held)
    assert more[:500] == list(training)
    assert list(tasks_of(source, 64, count=500, seed=1)[1]) != list(held)


def test_a_set_of_tasks_knows_its_families() -> None:
    tasks = TaskSet([Task("a", "x", "regex"), Task("b", "y", "regex"), Task("c", "x", "regex")])
    assert tasks.families == ("x", "y")
    assert tasks.of("x") == [0, 2]
    assert (len(tasks), tasks[1].prompt, [task.prompt for task in tasks[1:]]) == (3, "b", ["b", "c"])


def test_keys_are_the_same_in_every_process_and_follow_from_prompt_and_data() -> None:
    task = Task("3,4=7:", "2 numbers", "countdown", {"target": 7, "numbers": [3, 4]}, "3+4")
    code = f"from actors.llm.tasks import Task; print(Task({task.prompt!r}, '', '', {{'numbers': [3, 4], 'target': 7}}).key)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(printed) == task.key
    assert 0 <= task.key < 2**63
    assert Task("3,4=7:", "", "", {"target": 8, "numbers": [3, 4]}).key != task.key
    assert Task("3,4=8:", "", "", task.data).key != task.key
    assert Task("\ud800", "", "").key >= 0


def rows(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"What is {i} + 1?", "verifier": "regex", "pattern": str(i + 1), "family": f"f{i % 2}"}
        for i in range(count)
    ]


def jsonl(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return str(path)


def test_a_jsonl_file(tmp_path: Path) -> None:
    lines = rows(40)
    lines[3] |= {"data": {"mode": "search"}, "solution": "4"}
    path = jsonl(
        tmp_path / "prompts.jsonl", [*lines, *lines[:5], {"prompt": "last", "verifier": "regex", "pattern": ""}]
    )
    training, held = tasks_of(path)
    assert len(held) == 0
    assert [task.prompt for task in training] == [*(line["prompt"] for line in lines), "last"]
    assert training[3] == Task("What is 3 + 1?", "f1", "regex", {"pattern": "4", "mode": "search"}, "4")
    assert training[40].family == "all"
    assert training.families == ("all", "f0", "f1")
    assert len(tasks_of(path, count=10)[0]) == 10
    assert {task.verifier for task in tasks_of(path, verifier="countdown")[0]} == {"countdown"}


def test_what_a_file_holds_out_stays_so_when_lines_are_added(tmp_path: Path) -> None:
    few, held = tasks_of(jsonl(tmp_path / "few.jsonl", rows(400)), 50)
    more, same = tasks_of(jsonl(tmp_path / "more.jsonl", rows(900)), 50)
    assert len(held) == 50
    assert list(same) == list(held)
    assert more[: len(few)] == list(few)
    assert len(few) == 350
    assert not {task.prompt for task in more} & {task.prompt for task in held}
    fewer = tasks_of(jsonl(tmp_path / "fewer.jsonl", rows(40)), 50)
    assert 0 < len(fewer[1]) < 30
    assert len(fewer[0]) + len(fewer[1]) == 40


def test_a_parquet_file(tmp_path: Path) -> None:
    table = pa.table(
        {
            "prompt": ["a", "b", "a"],
            "family": ["x", None, "x"],
            "answer": ["1/2", "3", "1/2"],
            "data": ['{"strict": true}', None, None],
            "solution": ["s", None, None],
        }
    )
    pq.write_table(table, tmp_path / "prompts.parquet")
    training, _ = tasks_of(str(tmp_path / "prompts.parquet"), verifier="math")
    assert list(training) == [
        Task("a", "x", "math", {"answer": "1/2", "strict": True}, "s"),
        Task("b", "all", "math", {"answer": "3"}),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: expected a JSON object"),
        ("[1]", "line 2: expected an object with the key prompt, received list"),
        ('{"question": "x"}', "line 2: expected a prompt, received the keys question"),
        ('{"prompt": ""}', "line 2: expected a prompt"),
        ('{"prompt": 3}', "line 2: prompt must be text, received 3"),
        ('{"prompt": "x", "solution": 4}', "line 2: solution must be text"),
        ('{"prompt": "x", "data": [1]}', "line 2: data must be an object"),
        ('{"prompt": "x", "data": "{"}', "line 2, data: expected a JSON object"),
        ('{"prompt": "x"}', "names no verifier; add one, or set tasks.verifier"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine", "verifier": "regex"}\n' + line + "\n")
    with pytest.raises(TaskError, match=message):
        tasks_of(str(path))


@pytest.mark.parametrize(
    ("source", "more", "message"),
    [
        ("no/such.jsonl", {}, "there is no file"),
        ("numbers", {}, "must be countdown, arithmetic, a .jsonl or .parquet file"),
        ("no_such_module_at_all:f", {}, "cannot be imported"),
        ("json:no_such_function", {}, "cannot be imported"),
        ("countdown", {"kwargs": {"lowest": 2}}, "lowest"),
        ("countdown", {"kwargs": {"low": 9}}, "2 ≤ low"),
    ],
)
def test_a_source_that_does_not_exist_is_named(source: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        tasks_of(source, **more)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(TaskError, match="expected a Parquet file"):
        tasks_of(str(tmp_path / "a.parquet"))
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(TaskError, match="expected UTF-8"):
        tasks_of(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(TaskError, match="too few distinct prompts"):
        tasks_of(str(tmp_path / "a.jsonl"))
    with pytest.raises(TaskError, match=r"tasks\.kwargs are a generator's"):
        tasks_of(str(tmp_path / "a.jsonl"), kwargs={"low": 2})


def test_a_generator_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_prompts.py").write_text(
        "from actors.llm.tasks import Task\n"
        "def make(count, seed, *, word='x'):\n"
        "    for i in range(count):\n"
        "        prompt = f'{word}{i + seed}'\n"
        "        yield Task(prompt, 'odd', 'regex', {}) if i % 2 else {'prompt': prompt, 'verifier': 'regex', 'pattern': 'a'}\n"
        "def few(count, seed):\n"
        "    return [{'prompt': 'only one', 'verifier': 'regex'}] * count\n"
        "def wrong(count, seed):\n"
        "    return [{'prompt': 'a', 'verifier': 'regex'}, {'prompt': 'b', 'thing': {1}}]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    training, held = tasks_of("my_prompts:make", 2, seed=5, count=4, kwargs={"word": "p"})
    assert [task.prompt for task in (*held, *training)] == [f"p{i}" for i in range(5, 11)]
    assert training[0] == Task("p7", "all", "regex", {"pattern": "a"})
    with pytest.raises(TaskError, match="gave 1 distinct prompts, expected 4 to learn from and 2 to hold out"):
        tasks_of("my_prompts:few", 2, count=4)
    with pytest.raises(TaskError, match="task 1: what a verifier is given must be as in JSON"):
        tasks_of("my_prompts:wrong", count=2)
