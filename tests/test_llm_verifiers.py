"""The verifier processes under verifiers that hang, crash and eat memory; the built-in verifiers; the sandbox; the audit."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.llm.countdown import generate
from actors.llm.tasks import TaskError
from actors.llm.verifiers import math_answers, patterns, unit_tests
from actors.llm.verifiers import pool as pool_module
from actors.llm.verifiers.audit import Labelled, audit, labelled_sample, read_labelled
from actors.llm.verifiers.pool import VerifierPool
from actors.llm.verifiers.sandbox import SandboxError, run
from actors.llm.verifiers.verdict import PASSED, Unscored, Verdict, VerifierError, as_verdict, failed, load_verifier

HOSTILE = """
import ctypes, os, socket, sys, time
from actors.llm.verifiers.verdict import Verdict

hoard = []

def judge(completion, data):
    if completion == "print":
        print("what a verifier prints must not disturb the answers", flush=True)
        os.write(1, b"[0, []]\\n")
    if completion == "raise": raise RuntimeError("no")
    if completion == "hang": time.sleep(1000)
    if completion == "spin":
        while True: pass
    if completion == "exit": sys.exit(0)
    if completion == "_exit": os._exit(3)
    if completion == "crash": ctypes.string_at(0)
    if completion == "kill": os.kill(os.getpid(), 9)
    if completion == "eat":
        while True: hoard.append(bytearray(50_000_000))
    if completion == "nan": return float("nan")
    if completion == "none": return None
    if completion == "flaky":
        path = data["path"]
        if not os.path.exists(path):
            open(path, "w").close()
            raise RuntimeError("the first time only")
    if completion == "child":
        import subprocess
        with open(data["path"], "w") as file:
            file.write(str(subprocess.Popen(["sleep", "1000"]).pid))
        time.sleep(1000)
    if completion in ("fork", "fork on") and os.fork() == 0:
        if completion == "fork": time.sleep(1000)
        data = {"right": completion}  # what it says is not what counts
    if completion == "close": os.closerange(3, 256)
    if completion in ("mute", "deaf"):
        if completion == "mute" and os.fork() == 0: time.sleep(1000)
        hoard.extend(socket.socketpair())
        for fd in range(3, hoard[-2].fileno()): os.dup2(hoard[-2].fileno(), fd)
    if completion in ("steps", "numpy"): import numpy as np
    if completion == "steps": return Verdict(np.float32(0.5), np.bool_(False), "half", 0.25, ((1, np.float32(1.0)), (3, -1.0)))
    if completion == "numpy": return np.float32(1.0)
    if completion == "big": return Verdict(1.0, True, "x" * 300_000)
    return completion == data.get("right", "right")

def pid(completion, data):
    return Verdict(1.0, True, str(os.getpid()))
"""


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"hostile_{os.getpid()}"
    (tmp_path / f"{name}.py").write_text(HOSTILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return f"{name}:judge"


@pytest.fixture
def pool(hostile: str) -> Iterator[VerifierPool]:  # the processes look for modules where this one did when they started
    with VerifierPool(processes=2, timeout_s=1.0, memory_mb=200, retries=1) as made:
        yield made


def answers(pool: VerifierPool, within_s: float = 60.0) -> dict[Any, Verdict | Unscored]:
    """All that the pool still owes."""
    until = time.monotonic() + within_s
    found: dict[Any, Verdict | Unscored] = {}
    while pool.waiting:
        assert time.monotonic() < until, f"{pool.waiting} answers never came: {pool.counts()}"
        found.update(pool.ready(0.5))
    return found


def test_every_failure_of_a_verifier_is_unscored_and_costs_nobody_else_a_verdict(
    pool: VerifierPool, hostile: str
) -> None:
    reasons = {
        "raise": "raised RuntimeError: no",
        "hang": "took longer than 1 s",
        "spin": "took longer than 1 s",
        "exit": "ended its process with status 0",
        "_exit": "ended its process with status 3",
        "crash": "was ended by SIGSEGV",
        "kill": "was ended by SIGKILL",
        "eat": "allocated more than 200 MB",
        "nan": "must be finite",
        "none": "must return a Verdict",
    }
    tickets = [(bad, 0) for bad in reasons] + [("right", i) for i in range(400)]
    tickets += [("wrong", i) for i in range(400)]
    random.Random(0).shuffle(tickets)
    for ticket in tickets:
        pool.submit(ticket, hostile, ticket[0], {})
    found = answers(pool)
    assert set(found) == set(tickets)
    for (kind, _), answer in found.items():
        if kind in reasons:
            assert isinstance(answer, Unscored)
            assert reasons[kind] in answer.reason
        else:
            assert answer == (PASSED if kind == "right" else failed("wrong"))
    # Each of the 10 failed twice, and was judged again once; the kinds of failure are told apart.
    assert pool.counts() == {
        "scored": 800,
        "passed": 400,
        "unscored": 10,
        "retries": 10,
        "errors": 2 * 3,
        "timeouts": 2 * 2,
        "deaths": 2 * 5,
        "restarts": 2 * 7,
    }


@pytest.mark.parametrize("retries", [0, 3])
def test_a_failure_is_tried_again_as_often_as_asked(hostile: str, tmp_path: Path, retries: int) -> None:
    with VerifierPool(timeout_s=5.0, retries=retries) as pool:
        pool.submit("a", hostile, "flaky", {"path": str(tmp_path / "tried"), "right": "flaky"})
        pool.submit("b", hostile, "raise", {})
        found = answers(pool)
        counts = pool.counts()
    assert found["a"] == PASSED if retries else isinstance(found["a"], Unscored)
    assert isinstance(found["b"], Unscored)
    assert counts["errors"] == 2 + retries
    assert counts["retries"] == (1 + retries if retries else 0)


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_that_lose_their_pipes_or_leave_others_behind_cost_nobody_else_a_verdict(
    hostile: str, processes: int
) -> None:
    """A fork holds the pipe of its parent open, which then ends without an end of file; one that goes on must not answer."""
    kinds = [
        "right",
        "wrong",
        "right",
        "close",
        "fork",
        "right",
        "close",
        "fork on",
        "wrong",
        "right",
        "_exit",
        "fork",
    ] * 3
    with VerifierPool(processes=processes, timeout_s=5.0, retries=0) as pool:
        for number in range(100):  # so that batches of several are sent
            pool.submit(number, hostile, "right", {})
        answers(pool)
        for number, kind in enumerate(kinds):
            pool.submit((number, kind), hostile, kind, {})
        found = answers(pool, within_s=30.0)
        assert len(found) == len(kinds)
        for (_, kind), answer in found.items():
            if kind in ("close", "_exit"):
                assert isinstance(answer, Unscored)
                assert "ended its process with status" in answer.reason
            else:
                assert answer == (PASSED if kind == "right" else failed("wrong"))
        assert pool.counts()["deaths"] == 9


def test_a_process_that_ends_before_it_has_begun_charges_nobody_the_first_time(hostile: str) -> None:
    with VerifierPool(timeout_s=5.0, retries=0) as pool:
        pool.submit(0, hostile.replace(":judge", ":pid"), "", {})
        pid = int(answers(pool)[0].reason)
        os.kill(pid, signal.SIGSTOP)  # so that it cannot begin what it is sent
        for number in range(5):
            pool.submit(number, hostile, "right", {})
        os.kill(pid, signal.SIGKILL)
        assert answers(pool) == dict.fromkeys(range(5), PASSED)
        assert pool.counts()["restarts"] == 1
        assert pool.counts()["deaths"] == 0


def test_a_completion_whose_processes_always_end_gets_an_answer_in_the_end(hostile: str) -> None:
    with VerifierPool(timeout_s=5.0, retries=1) as pool:
        pool.submit(0, hostile, "right", {})
        until = time.monotonic() + 30.0
        found: list[tuple[Any, Verdict | Unscored]] = []
        while not found and time.monotonic() < until:
            for child in psutil.Process().children():
                child.kill()
            found = pool.ready()
        assert isinstance(found[0][1], Unscored)
        assert pool.counts()["restarts"] == 3
        assert pool.counts()["deaths"] == 2


def test_a_process_that_reads_and_answers_nothing_more_is_replaced(
    hostile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with VerifierPool(timeout_s=5.0, retries=0) as pool:
        for number, (kind, reason) in enumerate(
            {"deaf": "closed the pipes", "mute": "neither answered nor ended"}.items()
        ):
            pool.submit(0, hostile, "right", {})
            answers(pool)
            with monkeypatch.context() as soon:
                soon.setattr(pool_module, "STALL_S", 0.5)
                pool.submit(number, hostile, kind, {})
                answer = answers(pool, within_s=20.0)[number]
            assert isinstance(answer, Unscored)
            assert reason in answer.reason
        pool.submit(2, hostile, "right", {})
        assert answers(pool) == {2: PASSED}
        monkeypatch.setattr(pool_module, "STALL_S", 2.0)  # more than starting a process takes
        kinds = ["right", "mute", "right", "right", "wrong", "right"]
        for number, kind in enumerate(kinds):
            pool.submit(number, hostile, kind, {})
        found = answers(pool)
        assert isinstance(found.pop(1), Unscored)
        assert found == {i: PASSED if kind == "right" else failed("wrong") for i, kind in enumerate(kinds) if i != 1}


def test_a_verdict_comes_back_whole(pool: VerifierPool, hostile: str) -> None:
    for completion in ("steps", "numpy", "print", "right\ud800\n\x00é", "big"):
        pool.submit(completion, hostile, completion, {"right": "right\ud800\n\x00é"})
    found = answers(pool)
    assert found["steps"] == Verdict(0.5, False, "half", 0.25, ((1, 1.0), (3, -1.0)))
    assert found["numpy"] == PASSED
    assert found["print"] == failed("wrong")
    assert found["right\ud800\n\x00é"] == PASSED
    assert found["big"] == Verdict(1.0, True, "x" * 300_000)


def test_nothing_blocks_while_answers_pile_up(hostile: str) -> None:
    """Both pipes hold about 64 KB: answers of 12 MB that nobody reads, and requests of 12 MB."""
    with VerifierPool(timeout_s=5.0) as pool:
        began = time.monotonic()
        for number in range(40):
            pool.submit(number, hostile, "big", {"fill": "y" * 300_000})
        assert time.monotonic() - began < 5.0
        time.sleep(1.0)  # longer than it takes: what waits in a pipe is not overdue
        assert all(isinstance(answer, Verdict) and answer.passed for answer in answers(pool).values())
        assert pool.counts()["restarts"] == 0


def test_time_in_which_the_caller_does_not_look_is_not_the_verifiers(hostile: str) -> None:
    with VerifierPool(timeout_s=0.3) as pool:
        pool.submit(0, hostile, "right", {})
        answers(pool)
        for number in range(50):
            pool.submit(number, hostile, "right", {})
        time.sleep(0.6)
        assert all(answer == PASSED for answer in answers(pool).values())
        assert pool.counts()["timeouts"] == 0


def test_what_a_verifier_started_is_killed_with_it(hostile: str, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with VerifierPool(timeout_s=1.5, retries=0) as pool:
        pool.submit(0, hostile, "child", {"path": str(path)})
        assert "took longer" in answers(pool)[0].reason
    wait_for_end(int(path.read_text()))


def wait_for_end(pid: int) -> None:
    until = time.monotonic() + 10.0
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until, f"process {pid} lives on"
        time.sleep(0.02)


@pytest.mark.parametrize("how", ["error", "kill"])
def test_the_processes_end_with_their_parent(hostile: str, tmp_path: Path, how: str) -> None:
    script = f"""
        import os, sys
        from actors.llm.verifiers.pool import VerifierPool
        pool = VerifierPool(processes=2, timeout_s=100)
        for i in range(2):
            pool.submit(i, {hostile.replace(":judge", ":pid")!r}, "", {{}})
        pids = []
        while pool.waiting:
            pids += [verdict.reason for _, verdict in pool.ready(1.0)]
        pool.submit(0, {hostile!r}, "hang", {{}})
        pool.ready(0.2)
        print(*pids, flush=True)
        if {how == "error"}:
            raise RuntimeError("whatever")
        os.kill(os.getpid(), 9)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )
    assert done.returncode == (1 if how == "error" else -signal.SIGKILL)
    pids = {int(pid) for pid in done.stdout.split()}
    assert pids
    for pid in pids:
        wait_for_end(pid)


def test_close_ends_the_processes_and_may_be_called_again(hostile: str) -> None:
    pool = VerifierPool(timeout_s=100.0)
    pool.submit(0, hostile.replace(":judge", ":pid"), "", {})
    verdict = answers(pool)[0]
    pool.submit(0, hostile, "spin", {})
    pool.ready(0.2)
    pool.close()
    pool.close()
    wait_for_end(int(verdict.reason))
    assert pool.waiting == 0
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(0, hostile, "right", {})
    with pytest.raises(RuntimeError, match="closed"):
        pool.ready()


def test_a_pool_names_what_it_cannot_take(pool: VerifierPool) -> None:
    with pytest.raises(TypeError):
        pool.submit(0, "regex", "", {"pattern": object()})
    for arguments in ({"processes": 0}, {"timeout_s": 0}, {"memory_mb": 0}, {"retries": -1}):
        with pytest.raises(ValueError, match="verifier pool needs"):
            VerifierPool(**arguments)
    pool.submit(0, "no_such_module_at_all:judge", "", {})
    assert "cannot be imported" in answers(pool)[0].reason
    assert pool.counts()["restarts"] == 0


def test_many_cheap_verdicts_are_quick() -> None:
    """About 60 000/s on an idle core; the bound is low, for a busy machine."""
    tasks = generate(4000, 0)
    with VerifierPool() as pool:
        pool.submit(0, "countdown", "1", tasks[0].data)
        answers(pool)
        began = time.monotonic()
        for number, task in enumerate(tasks):
            pool.submit(number, "countdown", str(task.solution), task.data)
        found = answers(pool)
        assert time.monotonic() - began < 2.0
    assert len(found) == 4000
    assert all(answer == PASSED for answer in found.values())


def test_what_counts_as_a_verdict() -> None:
    assert as_verdict(True) == PASSED
    assert as_verdict(False) == failed("wrong")
    assert as_verdict(1) == PASSED
    assert as_verdict(0.75) == Verdict(0.75, False, "reward 0.75")
    for bad in (None, "1", [1.0]):
        with pytest.raises(VerifierError, match="must return a Verdict, a number or a bool"):
            as_verdict(bad)
    for wrong in (
        float("inf"),
        Verdict(0.0, False, shaped=float("nan")),
        Verdict(0.0, False, steps=((1, float("nan")),)),
    ):
        with pytest.raises(VerifierError, match="finite"):
            as_verdict(wrong)
    with pytest.raises(VerifierError, match="one after another"):
        as_verdict(Verdict(0.0, False, steps=((3, 0.0), (1, 0.0))))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "is one of countdown, arithmetic, math, regex, tests or package.module:function"),
        ("no_such_module_at_all:judge", "cannot be imported"),
        ("json:judge", "has no judge"),
        ("json:__name__", "must be a function"),
    ],
)
def test_a_verifier_that_does_not_exist_is_named(name: str, message: str) -> None:
    with pytest.raises(VerifierError, match=message):
        load_verifier(name)


@pytest.mark.parametrize(
    ("completion", "data", "passes"),
    [
        ("abc", {"pattern": "a.c"}, True),
        ("xabc", {"pattern": "a.c"}, False),
        ("xabcx", {"pattern": "a.c", "mode": "search"}, True),
        ("ABC", {"pattern": "abc", "flags": "i"}, True),
        ("a\nc", {"pattern": "a.c"}, False),
        ("a\nc", {"pattern": "a.c", "flags": "s"}, True),
        ("x=1 x=2", {"pattern": "x=(.)", "mode": "search", "answer": "2"}, True),
        ("x=1 x=2", {"pattern": "x=(.)", "mode": "search", "answer": 1}, False),
        ("x=2", {"pattern": "x=(.)", "answer": 2}, True),
        ("b", {"pattern": "(a)|b", "answer": "a"}, False),
    ],
)
def test_patterns(completion: str, data: dict[str, Any], passes: bool) -> None:
    verdict = patterns.verify(completion, data)
    assert verdict.passed == passes
    assert bool(verdict.reason) != passes


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"pattern": "("}, "not a regular expression"),
        ({"pattern": "a", "mode": "match"}, "full or search"),
        ({"pattern": "a", "flags": "x"}, "flags"),
        ({"pattern": "a", "answer": "a"}, "needs a group"),
    ],
)
def test_a_wrong_pattern_is_the_tasks_fault(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patterns.verify("a", data)


def test_a_pattern_that_backtracks_without_end_gives_no_verdict() -> None:
    """It holds the interpreter's lock all the while: only the parent can end it."""
    with VerifierPool(timeout_s=0.5, retries=0) as pool:
        pool.submit("endless", "regex", "a" * 40 + "b", {"pattern": "(a+)+"})
        pool.submit("fine", "regex", "aaa", {"pattern": "a+"})
        found = answers(pool)
    assert found["fine"] == PASSED
    assert isinstance(found["endless"], Unscored)
    assert "took longer" in found["endless"].reason


def test_math_answers() -> None:
    assert math_answers.verify(r"Hence $\boxed{\frac{2}{4}}$", {"answer": "0.5"}) == PASSED
    assert math_answers.verify(r"first $3$, so \boxed{8}", {"answer": "8"}) == PASSED
    assert "not 8" in math_answers.verify(r"\boxed{9}", {"answer": 8}).reason
    assert math_answers.verify("no idea", {"answer": "8"}) == failed("no answer found")
    with pytest.raises(ValueError, match="cannot be read"):
        math_answers.verify("8", {"answer": " "})


def test_want_of_memory_is_no_wrong_answer() -> None:
    """math-verify catches the MemoryError, and would say that the two are not equal."""
    with VerifierPool(timeout_s=20.0, memory_mb=64, retries=0) as pool:
        pool.submit("huge", "math", r"\boxed{\frac{2^{1000000000}}{2^{1000000000}}}", {"answer": "1"})
        pool.submit("fine", "math", r"\boxed{\frac{2^{1000}}{2^{1000}}}", {"answer": "1"})
        pool.submit("wrong", "math", r"\boxed{2}", {"answer": "1"})
        found = answers(pool)
        assert pool.counts()["restarts"] == 1
    assert found["fine"] == PASSED
    assert found["wrong"] == failed("answers 2, not 1")
    assert found["huge"] == Unscored("verifier math allocated more than 64 MB")


def test_a_trace_function_is_left_as_it_was() -> None:
    """Such as a debugger's or that of a measurement of coverage."""
    seen = []
    before = sys.gettrace()

    def trace(frame: object, event: str, argument: object) -> None:
        seen.append(event)

    sys.settrace(trace)
    try:
        math_answers.verify("$1$", {"answer": "1"})
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)


def test_unit_tests_judge_code() -> None:
    data = {"tests": "assert double(2) == 4"}
    assert unit_tests.verify("def double(x): return 2 * x", data) == PASSED
    assert unit_tests.verify("Text\n```python\ndef double(x):\n    return 2 * x\n```", data) == PASSED
    assert unit_tests.verify("def double(x): return x", data) == failed("AssertionError")
    assert unit_tests.verify("def double(x:", data).reason.startswith("SyntaxError")
    cases = {"cases": [{"stdin": "1\n", "stdout": "2\n"}, {"stdin": "2\n", "stdout": "4\n"}]}
    assert unit_tests.verify("print(2 * int(input()), '')", cases) == PASSED
    assert unit_tests.verify("print(2)", cases) == failed("case 2 of 2: printed '2', not '4'")
    with pytest.raises(ValueError, match="tests or cases"):
        unit_tests.verify("", {})


@pytest.mark.parametrize("name", ["cpu_s", "memory_mb"])
@pytest.mark.parametrize("value", [0.5, 0, -1, 1.5, "2", True, None, math.nan, math.inf])
def test_limits_that_are_none_are_the_tasks_fault(name: str, value: object) -> None:
    """Not the code's, which would fail with 0 seconds."""
    with pytest.raises(ValueError, match=f"{name} of unit tests must be a whole number from 1 on"):
        unit_tests.verify("pass", {"tests": "", name: value})


def test_limits_may_be_written_as_floats() -> None:
    assert unit_tests.verify("pass", {"tests": "", "cpu_s": 2.0, "memory_mb": 256.0}) == PASSED


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        ("sys.exit(0)", ""),
        ("exit()", ""),
        ("raise SystemExit", ""),
        ("sys.exit(3)", "exited before its end"),
        ("sys.exit('bad')", "bad"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("os.kill(os.getpid(), 9)", "was ended by SIGKILL"),
    ],
)
def test_a_program_that_printed_what_it_should_may_end_by_exit(ending: str, reason: str) -> None:
    code = f"import os, sys\nprint(int(input()) ** 2, flush=True)\n{ending}"
    verdict = unit_tests.verify(code, {"cases": [{"stdin": "3", "stdout": "9"}]})
    assert verdict == (failed(f"case 1 of 1: {reason}") if reason else PASSED)


@pytest.mark.parametrize("way_out", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"])
def test_code_that_ends_before_its_tests_has_not_passed(way_out: str) -> None:
    verdict = unit_tests.verify(way_out, {"tests": "assert False"})
    assert verdict == failed("exited before its end")


def test_code_that_never_ends_fails_by_its_cpu_time() -> None:
    assert unit_tests.verify("while True: pass", {"tests": "", "cpu_s": 1}) == failed("ran out of CPU time")


def test_code_that_sleeps_gives_no_verdict_and_is_killed() -> None:
    with VerifierPool(timeout_s=1.0, retries=0) as pool:
        pool.submit(0, "tests", "import time; time.sleep(12345)", {"tests": ""})
        assert "took longer" in answers(pool)[0].reason
    until = time.monotonic() + 10.0
    while any("sleep(12345)" in " ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"])):
        assert time.monotonic() < until


def test_the_sandbox_has_no_network() -> None:
    outcome = run("""
import socket
for address in (("127.0.0.1", 9), ("192.0.2.1", 80), ("8.8.8.8", 53)):
    try:
        socket.create_connection(address, timeout=2)
    except OSError as error:
        print(error.errno)
print(*(name for _, name in socket.if_nameindex()))
""")
    assert outcome.completed, outcome.stderr
    assert outcome.stdout.split() == ["101", "101", "101", "lo"]  # ENETUNREACH, even where something listens


def test_a_listener_of_this_machine_is_out_of_the_sandboxs_reach(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        path = str(tmp_path / "socket")
        unix.bind(path)
        unix.listen()
        os.chmod(path, 0o777)
        outcome = run(f"""
import socket
for family, address in ((socket.AF_INET, ("127.0.0.1", {tcp.getsockname()[1]})), (socket.AF_UNIX, {path!r})):
    try:
        socket.socket(family).connect(address)
        print("connected")
    except OSError as error:
        print(type(error).__name__)
""")
    assert outcome.stdout.split() == ["OSError", "FileNotFoundError"]


def test_the_sandbox_cannot_fork_without_end() -> None:
    before = set(psutil.pids())
    outcome = run("""
import os, time
children = 0
try:
    while children < 1000:
        if os.fork() == 0:
            os.setsid()
            time.sleep(1000)
        children += 1
except OSError:
    print(children)
""")
    assert outcome.completed
    assert 1 <= int(outcome.stdout) < 32
    left = [
        p for p in psutil.process_iter(["uids", "pid"]) if p.info["pid"] not in before and p.info["uids"].real > 10**9
    ]
    assert left == []


def test_the_sandbox_reads_and_writes_nothing_of_ours(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("top")
    secret.chmod(0o666)
    outcome = run(f"""
import os
def attempt(what, *arguments):
    try:
        what(*arguments)
        print("did", what.__name__, *arguments)
    except (OSError, ValueError) as error:
        pass
attempt(open, {str(secret)!r})
attempt(open, {str(secret)!r}, "w")
attempt(open, {str(Path(__file__))!r})
attempt(open, os.__file__, "a")
attempt(open, os.path.dirname(os.__file__) + "/new.py", "w")
attempt(open, "/new", "w")
attempt(os.kill, {os.getpid()}, 0)
attempt(os.kill, 1, 9)
attempt(os.listdir, "/home")
attempt(os.setuid, 0)
attempt(os.chroot, "/tmp")
attempt(open, "/proc/1/mem", "rb")
attempt(open, "/proc/1/environ", "rb")
print(os.getpid() < 10, os.getcwd(), sorted(os.listdir(".")), "SECRET" in os.environ)
open("kept", "w").write("1")
""")
    assert outcome.completed, outcome.stderr
    lines = outcome.stdout.splitlines()
    # Signals to the first process of the namespace do not fail, but do nothing either.
    assert [line for line in lines[:-1] if line != "did kill 1 9"] == []
    assert lines[-1] == "True /tmp ['program.py'] False"
    assert secret.read_text() == "top"
    assert run("import os; print(os.path.exists('kept'))").stdout == "False\n"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("x = bytearray(10**9)", "MemoryError"),
        ("open('x', 'wb').write(b'x' * 10**7)", "File too large"),
        ("files = [open('/dev/null') for _ in range(1000)]", "Too many open files"),
        ("import ctypes; ctypes.string_at(0)", "was ended by SIGSEGV"),
        ("import os; os.write(4, b'x' * 32); os._exit(0)", "exited before its end"),
    ],
)
def test_the_sandbox_limits(program: str, reason: str) -> None:
    outcome = run(program)
    assert not outcome.completed
    assert reason in outcome.reason


def test_a_refused_sandbox_runs_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a user without privileges who may have no user namespaces: here by a limit of none of them."""
    if os.geteuid() != 0:
        pytest.skip("needs root to take its own privileges away")
    script = "from actors.llm.verifiers.sandbox import run; run('print(1)')"
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-c", script]
    mapped = "echo 0 > /proc/sys/user/max_net_namespaces; exec " + " ".join(f"'{part}'" for part in command[3:-1])
    done = subprocess.run(
        [*command[:3], "sh", "-c", f'{mapped} "$0"', script], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert SandboxError.__name__ in done.stderr
    assert "unshare" in done.stderr


@pytest.mark.parametrize("name", ["countdown", "arithmetic", "math", "regex"])
def test_built_in_verifiers_are_right_on_their_labelled_samples(name: str) -> None:
    sample = labelled_sample(name, 200, 1)
    assert len(sample) == {"math": 10, "regex": 6}.get(name, 200)
    found = audit(name, sample)
    wrong = (found.false_negatives, found.false_positives, found.unscored)
    assert (found.total, *wrong) == (len(sample), 0, 0, 0), found.examples
    assert found.right == len(sample) // 2


def test_unit_tests_are_right_on_their_labelled_sample() -> None:
    found = audit("tests", labelled_sample("tests", 8, 1))
    assert (found.right, found.false_negatives, found.false_positives, found.unscored) == (4, 0, 0, 0), found.examples


def test_an_audit_counts_each_kind_of_mistake(hostile: str) -> None:
    sample = [Labelled("right", {}, True)] * 5 + [Labelled("wrong", {}, False)] * 4
    sample += [Labelled("wrong", {}, True)] * 3 + [Labelled("right", {}, False)] * 2 + [Labelled("raise", {}, True)]
    with VerifierPool() as pool:
        found = audit(hostile, sample, pool=pool)
    assert (found.total, found.right) == (15, 9)
    assert (found.false_negatives, found.false_positives, found.unscored) == (3, 2, 1)
    assert found.false_negative_rate == pytest.approx(3 / 9)
    assert found.false_positive_rate == pytest.approx(2 / 6)
    assert len(found.examples) == 6


def test_labelled_samples_are_read_from_files(tmp_path: Path) -> None:
    path = tmp_path / "labelled.jsonl"
    rows = [
        {"completion": "a", "data": {"pattern": "a"}, "passed": True},
        {"completion": "b", "data": {"pattern": "a"}, "passed": True},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert list(read_labelled(path)) == [Labelled(**row) for row in rows]  # type: ignore[arg-type]
    found = audit("regex", read_labelled(path))
    assert (found.total, found.false_negatives) == (2, 1)
    for bad in ("{", '{"completion": "a"}', '{"completion": "a", "data": {}, "passed": 1}'):
        path.write_text(json.dumps(rows[0]) + "\n" + bad)
        with pytest.raises(TaskError, match="line 2: expected"):
            list(read_labelled(path))
    with pytest.raises(ValueError, match="label some of your own"):
        labelled_sample("json:loads", 1, 0)
