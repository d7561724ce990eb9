"""Who may import whom: one way between the rooms, ray and torch only where they belong, and nothing unpickled."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("configs", "replay", "learners", "actors", "cluster")  # Each may import itself and those before it.
BANNED = {
    "configs": {"torch", "ray", "envpool"},
    "replay": {"torch", "ray", "envpool"},
    "learners": {"ray", "envpool"},
    "actors": {"ray"},
    "cluster": {"ray"},  # But for its ray_*.py and train.py.
}
PICKLE = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"torch.load", "torch.save", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle"}
LAZY = {"torch", "ray", "envpool", "matplotlib"}


def imports(tree: ast.AST) -> Iterator[tuple[str, int, bool]]:
    """Every imported module as (dotted name, line, whether importing the file imports it), at any depth."""
    later = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test))
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            # `from cluster import ray_head` names a module, `from cluster.cli import main` an attribute: both are covered.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
            "import_module",
            "__import__",
        ):
            names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        for name in names:
            yield name, getattr(node, "lineno", 0), id(node) not in later


def layer_violations(root: Path) -> list[str]:
    """Imports under `root` that break the rules, as `file:line: what`."""
    found = []
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            # train.py is the script that a cluster runs.
            holds_ray = room == "cluster" and (path.name.startswith("ray_") or path.name == "train.py")
            for name, line, at_once in imports(ast.parse(path.read_text(), str(path))):
                top = name.partition(".")[0]
                where = f"{path.relative_to(root)}:{line}"
                if top == "tests" or (top in ROOMS and ROOMS.index(top) > ROOMS.index(room)):
                    found.append(f"{where}: {room} imports {top}")
                if top in BANNED[room] and not (top == "ray" and holds_ray):
                    found.append(f"{where}: {path.name} imports {top}")
                if name.startswith("cluster.ray_") and at_once and not holds_ray:
                    found.append(
                        f"{where}: {name} is imported with {path.name}, so ray is; import it inside a function"
                    )
    return found


def unsafe_calls(root: Path) -> list[str]:
    """Whatever under `root` could run code that it reads, as `file:line: what`."""
    found = []
    for room in (*ROOMS, "tests"):
        for path in sorted((root / room).rglob("*.py")):
            tree = ast.parse(path.read_text(), str(path))
            where = path.relative_to(root)
            aliases = {
                alias.asname or alias.name: f"{getattr(node, 'module', None) or ''}.{alias.name}".lstrip(".")
                for node in ast.walk(tree)
                if isinstance(node, ast.Import | ast.ImportFrom)
                for alias in node.names
            }
            found += [f"{where}:{line}: {n}" for n, line, _ in imports(tree) if n.partition(".")[0] in PICKLE]
            for node in ast.walk(tree):
                if not isinstance(node, ast.Call):
                    continue
                first, dot, rest = ast.unparse(node.func).partition(".")
                name = aliases.get(first, first) + dot + rest
                pickled = any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords)
                if name in UNSAFE_CALLS or name in ("eval", "exec") or pickled:
                    found.append(f"{where}:{node.lineno}: {name}")
    return found


def test_imports_run_one_way() -> None:
    assert layer_violations(ROOT) == []


def test_nothing_is_unpickled_or_evaluated() -> None:
    assert unsafe_calls(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("configs/a.py", "import replay.schema", "configs imports replay"),
        ("replay/a.py", "from learners import sac", "replay imports learners"),
        ("learners/a.py", "def f():\n    import actors.envs", "learners imports actors"),
        ("actors/a.py", "from cluster.cli import main", "actors imports cluster"),
        ("cluster/a.py", "from tests import helpers", "cluster imports tests"),
        ("replay/a.py", "import torch.nn as nn", "a.py imports torch"),
        ("replay/a.py", "import importlib\nimportlib.import_module('ray.data')", "a.py imports ray"),
        ("configs/deep/a.py", "import ray", "a.py imports ray"),
        ("learners/a.py", "def f():\n    from envpool import make", "a.py imports envpool"),
        ("actors/a.py", "try:\n    import ray\nexcept ImportError:\n    pass", "a.py imports ray"),
        ("cluster/a.py", "def f():\n    import ray", "a.py imports ray"),
        ("cluster/a.py", "from cluster import ray_head", "inside a function"),
        ("cluster/a.py", "from cluster.ray_head import Head", "inside a function"),
    ],
)
def test_a_forbidden_import_is_caught(tmp_path: Path, file: str, line: str, message: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    (found,) = layer_violations(tmp_path)
    assert found.startswith(file)
    assert message in found


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("cluster/ray_head.py", "import ray\nfrom cluster.ray_actor import Worker"),
        ("cluster/cli.py", "def start():\n    from cluster.ray_head import Head\n    return Head"),
        ("cluster/a.py", "import torch, actors.envs, learners.sac, replay.schema, configs.schema"),
        ("learners/a.py", "import torch\nfrom replay.schema import StepSchema\nfrom . import heads"),
        ("actors/a.py", "import envpool\nimport raylib"),
    ],
)
def test_an_allowed_import_is_not(tmp_path: Path, file: str, line: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert layer_violations(tmp_path) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from cloudpickle import loads",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x')",
        "from torch import load\nload('x')",
        "eval('1')",
        "def f():\n    exec('1')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import yaml\nyaml.unsafe_load('x')",
    ],
)
def test_unpickling_is_caught(tmp_path: Path, line: str) -> None:
    (tmp_path / "replay").mkdir()
    (tmp_path / "replay" / "a.py").write_text(line + "\n")
    assert len(unsafe_calls(tmp_path)) == 1


def test_safe_reading_is_not(tmp_path: Path) -> None:
    (tmp_path / "replay").mkdir()
    text = (
        "import yaml, numpy as np\nyaml.safe_load('x')\nnp.load('x', allow_pickle=False)\nmodel = f()\nmodel.eval()\n"
    )
    (tmp_path / "replay" / "a.py").write_text(text)
    assert unsafe_calls(tmp_path) == []


@pytest.mark.parametrize("module", ["configs.load", "cluster", "cluster.cli"])
def test_the_command_starts_without_the_heavy_libraries(module: str) -> None:
    """So that `--help` and a wrong setting answer at once, and `--mode sync` works where ray is not installed."""
    code = f"import sys, {module}; print(sorted({LAZY!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
