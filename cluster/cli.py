"""The command line: `millrace train | eval | report | export | audit | replay | bench | clean`, and of a run that is going
`status | scale | checkpoint | stop | logs`.

Exit codes: 0 done (also after Ctrl-C or SIGTERM, with a checkpoint), 1 the command failed, 2 it was asked for something
impossible; what is wrong stands in the message, before any process is started.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.runs import RunFolder
    from configs.schema import RunConfig

# Before numpy is imported: its BLAS would put a spinning thread on every core for each small product of an actor.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from configs.load import ConfigError, load_run, nearest, settings_help

USAGE = """\
millrace: distributed actor-learner system for online reinforcement learning

  millrace train [CONFIG] [--SETTING VALUE …] [--resume RUN] [--json]   train; `millrace train --help` lists the settings
  millrace eval RUN [--episodes N] [--seed S] [--checkpoint best|latest] [--video FILE.gif] [--json]
  millrace report RUN [--json]                                          make RUN/report.html again
  millrace export RUN FILE.onnx [--checkpoint best|latest] [--json]     write the policy as ONNX, checked against torch; a
                                                                        language model as a Hugging Face folder
  millrace status [TARGET] [--all] [--json]                             a run that is going: processes, rates, what waits
  millrace scale [TARGET] [--actors N] [--shards N] [--wait S] [--json] change how many actors and shards it has
  millrace checkpoint [TARGET] [--json]                                 have it write a checkpoint
  millrace stop [TARGET] [--reason TEXT] [--no-wait] [--json]           have it end, with a checkpoint first
  millrace logs [TARGET] [--process "actor 3"] [--lines N] [--follow] [--json]
  millrace replay stats|export|import …                                 look into, export and fill a replay service or snapshot
  millrace audit VERIFIER [LABELLED.jsonl] [--json]                     how often a verifier is wrong where the truth is known
  millrace bench actors|train [CONFIG] [--SETTING VALUE …] [--seconds S] [--json]
  millrace bench replay [--seconds S] [--only PATTERN] [--peers] [--json]
  millrace bench learner [--seconds S] [--only PATTERN] [--threads 1 2] [--device auto] [--save] [--json]
  millrace bench curves [--only PATTERN] [--seeds 3] [--jobs 2] [--folder DIR] [--plot-only] [--save] [--json]
  millrace bench llm [--seconds S] [--only PATTERN] [--save] [--json]
  millrace bench difficulty [--subject difficulty|staleness] [--seeds 3] [--updates 200] [--jobs 2] [--save] [--json]
  millrace bench tasks [--curricula uniform band] [--seeds 3] [--jobs 2] [--folder DIR] [--plot-only] [--save] [--json]
  millrace bench curriculum [--tasks N] [--groups N] [--seeds 3] [--save] [--json]
  millrace bench cluster [--only PATTERN] [--actors 1 2 4 8 16] [--json]  the head's work, weights to actors, recovery
  millrace bench scale [--costs FILE] [--check FILE …] [--json]         what bounds a run of many actors, by a model
  millrace clean [--directory DIR] [--yes] [--json]                     list (--yes: remove) storage of dead runs

CONFIG is a YAML file; those that come with Millrace can be named by their short names, such as pendulum_sac.
TARGET is the folder of a run, or HOST:PORT of its control plane with --token-file FILE; by default the only run going in ./runs.
"""


class UsageError(ValueError):
    """The command line asks for something impossible."""


@dataclass(frozen=True)
class Words:
    """A command line of settings: CONFIG first, then the command's own options, then settings."""

    config: str | None
    options: dict[str, str | None]  # own options given; None where it takes no value
    settings: list[str]


def split_words(words: Sequence[str], *, valued: Sequence[str], bare: Sequence[str]) -> Words:
    """Tell a command's own options, some with a value, from settings.

    Raises:
        UsageError: an option that takes a value has none.
    """
    config: str | None = None
    options: dict[str, str | None] = {}
    settings: list[str] = []
    rest = list(words)
    if rest and not rest[0].startswith("-"):
        config = rest.pop(0)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if word in bare:
            options[word] = None
        elif name in valued:
            if not equals:
                if not rest:
                    raise UsageError(f"{name} needs a value")
                value = rest.pop(0)
            options[name] = value
        else:
            settings.append(word)
    return Words(config, options, settings)


def _train(words: Sequence[str]) -> int:
    split = split_words(words, valued=["--resume"], bare=["--json", "--help", "-h"])
    resume, as_json = split.options.get("--resume"), "--json" in split.options
    source: str | Path | None = split.config
    if resume is not None:
        if split.config is not None:
            raise UsageError(f"--resume takes the settings of {resume}; leave {split.config} out")
        source = Path(resume) / "config.yaml"
        if not source.is_file():
            raise UsageError(f"{resume} is not the folder of a run: it holds no config.yaml")
    if {"--help", "-h"} & split.options.keys():
        print("millrace train [CONFIG] [--SETTING VALUE …] [--resume RUN] [--json]\n")
        about = load_run(source, split.settings)
        if about.kind == "control":
            print("The settings of language models: millrace train --kind llm --help\n")
        print(settings_help(about))
        return 0
    config = load_run(source, split.settings)

    from rich.console import Console

    from cluster.api import train
    from replay.files import leftovers

    console = Console(stderr=as_json)
    for left in leftovers(config.replay.directory):
        console.print(
            f"left by a dead run: {left.path} ({left.size / 2**20:.0f} MiB); `millrace clean` lists it", soft_wrap=True
        )
    started = _process_started()
    run = train(config, resume=resume, console=console, command=["millrace", "train", *words], started=started)
    summary = run.summary
    if as_json:
        first = (
            ("updates", "samples", "pass_at_1", "greedy")
            if config.kind == "llm"
            else ("steps", "updates", "mean_return")
        )
        found = {"run": str(run.path), **{key: summary[key] for key in first}}
        print(json.dumps({**found, "wall_s": round(time.time() - _process_started(), 3), **summary}))
    else:
        for line in _outcome(config.kind, summary):
            print(line)
        print(f"report: {run.report}")
    return 0


def _outcome(kind: str, summary: Mapping[str, Any]) -> Iterator[str]:
    """How a run ended, in lines for a person."""
    done = f"{summary['samples']} completions" if kind == "llm" else f"{summary['steps']} steps"
    yield f"{summary['stop_reason']}: {done}, {summary['updates']} updates, {summary['time_s']:.1f} s"
    if kind == "llm" and summary["pass_at_1"] is not None:
        before = summary.get("pass_at_1_before")
        first = (
            "" if before is None else f"first evaluation: pass@1 {before:.3f}, greedy {summary['greedy_before']:.3f}; "
        )
        yield f"{first}last: pass@1 {summary['pass_at_1']:.3f}, greedy {summary['greedy']:.3f}"
        yield f"evaluations took {summary['eval_s']:.1f} s"
    if kind != "llm" and summary["mean_return"] is not None:
        if "success" in summary:
            yield f"last evaluation: success {summary['success']:.2f}, worst drop {summary['worst_drop']:.2f}"
        yield f"last evaluation: mean return {summary['mean_return']:.1f} ± {summary['std_return']:.1f}"
        yield f"evaluations took {summary['eval_s']:.1f} s, left out of the {summary['steps_per_s'] or 0:.0f} steps/s"


def _eval(words: Sequence[str]) -> int:
    parser = _parser(
        "eval", "Run deterministic episodes with the policy of a run; have a language model answer held-out prompts."
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument(
        "--episodes",
        type=_positive,
        default=None,
        help="episodes (default 10), of each task; of a language model, prompts",
    )
    parser.add_argument(
        "--seed", type=int, default=None, help="seed, of the first environment (default: the run's eval.seed)"
    )
    parser.add_argument("--checkpoint", choices=("best", "latest"), default="best", help="by evaluation, or newest")
    parser.add_argument("--video", type=Path, default=None, metavar="FILE.gif", help="draw one episode into a GIF")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    chosen = parser.parse_args(words)

    from cluster.runs import RunFolder

    folder = RunFolder.open(chosen.run)
    if folder.config.kind == "llm":
        from cluster.llm import cli as llm

        return llm.evaluate(folder, chosen)
    return _evaluate(folder, chosen)


def _evaluate(folder: RunFolder[RunConfig], chosen: argparse.Namespace) -> int:
    """`millrace eval` of a control run."""
    from actors.evaluate import record
    from cluster import parts
    from cluster.checkpoint import Checkpoints
    from cluster.evaluating import Evaluating
    from cluster.head import Evaluation
    from cluster.recorder import POLICY

    config = folder.config
    checkpoints = Checkpoints(folder.checkpoints, keep=config.checkpoints.keep)
    checkpoint = (checkpoints.best() if chosen.checkpoint == "best" else None) or checkpoints.latest()
    if checkpoint is None:
        raise FileNotFoundError(f"{chosen.run} holds no whole checkpoint yet")
    tasks = parts.make_tasks(config)
    if tasks is not None and chosen.video is not None:
        raise ValueError("--video draws the environment of a run without tasks, and this run has tasks; leave it out")
    policy = parts.make_policy(config, parts.env_schema(config, tasks))
    seed = config.eval.seed if chosen.seed is None else chosen.seed
    settings = config.eval.model_copy(update={"episodes": chosen.episodes or 10, "seed": seed})
    evaluating = Evaluating(config.model_copy(update={"eval": settings}), tasks, policy)
    try:
        told = evaluating.run((checkpoint.path / POLICY).read_bytes())
    finally:
        evaluating.close()
    made = Evaluation.of(told, step=checkpoint.env_steps, version=0)
    found: dict[str, Any] = {"episodes": len(made.returns), "mean_return": made.mean, "std_return": made.std}
    if made.tasks:
        by_task = {name: {"mean_return": one.mean, "success": one.success} for name, one in made.tasks.items()}
        found |= {"success": made.success, "tasks": by_task}
    found |= {"checkpoint": str(checkpoint.path), "seed": seed}
    if chosen.video is not None:
        found["video_return"] = record(config.env, policy, path=chosen.video, seed=seed)
        found["video"] = str(chosen.video)
    if chosen.json:
        print(json.dumps(found))
    else:
        success = "" if made.success is None else f"success {made.success:.2f} over {len(made.tasks)} tasks, "
        print(
            f"{checkpoint.path}: {success}mean return {made.mean:.1f} ± {made.std:.1f} over {len(made.returns)} episodes"
        )
        for name, one in made.tasks.items():
            print(f"  {name}: success {one.success:.2f}, mean return {one.mean:.1f}")
        if chosen.video is not None:
            print(f"{chosen.video}: one episode with return {found['video_return']:.1f}")
    return 0


def _report(words: Sequence[str]) -> int:
    parser = _parser("report", "Make the report of a run again.")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    chosen = parser.parse_args(words)

    from cluster.report import write_report

    path = write_report(chosen.run)
    print(json.dumps({"report": str(path)}) if chosen.json else path)
    return 0


def _export(words: Sequence[str]) -> int:
    parser = _parser(
        "export",
        "Write the deterministic policy of a run as ONNX, and check it against the policy that actors run; of a language model "
        "a Hugging Face folder.",
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("file", type=Path, help="the file, or the language model's folder, to write")
    parser.add_argument("--checkpoint", choices=("best", "latest"), default="best", help="by evaluation, or newest")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    chosen = parser.parse_args(words)

    from cluster.runs import RunFolder

    folder = RunFolder.open(chosen.run)
    if folder.config.kind == "llm":
        from cluster.llm import cli as llm

        return llm.export(folder, chosen)
    from cluster.export import export

    found = export(chosen.run, chosen.file, checkpoint=chosen.checkpoint)
    if chosen.json:
        print(json.dumps(found.to_json()))
        return 0
    torch, acting = found.differences.torch, found.differences.acting
    print(f"{found.path}: {', '.join(found.inputs)} to {', '.join(found.outputs)}, from {found.checkpoint}")
    print(
        f"largest difference on random observations: {torch:.1e} from torch, {acting:.1e} from the policy of the actors"
    )
    return 0


def _replay(words: Sequence[str]) -> int:
    from cluster import replay_cli

    return replay_cli.main(words)


def _bench(words: Sequence[str]) -> int:
    names = [
        "actors",
        "train",
        "replay",
        "learner",
        "curves",
        "llm",
        "difficulty",
        "curriculum",
        "tasks",
        "cluster",
        "scale",
    ]
    own = tuple(names[2:])  # these take no settings of a run
    if {"-h", "--help"} & set(words) and words[0] not in own:
        print("millrace bench actors|train [CONFIG] [--SETTING VALUE …] [--seconds S] [--json]")
        print("millrace bench replay|learner|curves|llm|difficulty|curriculum|tasks|cluster|scale [--help | …]")
        return 0
    if not words or words[0] not in names:
        close = nearest(words[0], names) if words else None
        raise UsageError(f"bench takes one of {', '.join(names)}" + (f"; did you mean {close}?" if close else ""))
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / "tests" / "benchmarks").is_dir():
        raise UsageError("benchmarks are part of the source tree; install Millrace from a checkout: pip install -e .")
    paths = [str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    # -P: a package named tests in the user's folder is not ours.
    command = [sys.executable, "-P", "-m"]
    command += [f"tests.benchmarks.{words[0]}", *words[1:]] if words[0] in own else ["tests.benchmarks", *words]
    return subprocess.run(command, env=environment, check=False).returncode


def _control(name: str) -> Callable[[Sequence[str]], int]:
    """A command about a run that is going."""

    def run(words: Sequence[str]) -> int:
        from cluster import control_cli

        command: Callable[[Sequence[str]], int] = getattr(control_cli, name)
        return command(words)

    return run


def _audit(words: Sequence[str]) -> int:
    from cluster.llm.cli import audit_verifier

    return audit_verifier(words)


def _clean(words: Sequence[str]) -> int:
    parser = _parser("clean", "List, or remove, replay storage that dead runs left.")
    parser.add_argument("--directory", default="/dev/shm", help="replay.directory of the runs (default /dev/shm)")
    parser.add_argument("--yes", action="store_true", help="remove what is listed")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    chosen = parser.parse_args(words)

    from replay.files import leftovers

    found = leftovers(chosen.directory)
    if chosen.yes:
        for left in found:
            left.path.unlink(missing_ok=True)
    if chosen.json:
        files = [{"path": str(left.path), "run": left.run, "shard": left.shard, "bytes": left.size} for left in found]
        print(json.dumps({"files": files, "removed": chosen.yes}))
        return 0
    for left in found:
        print(f"{'removed ' if chosen.yes else ''}{left.path}  {left.size / 2**20:.0f} MiB  run {left.run}")
    if not found:
        print(f"no dead run left anything in {chosen.directory}")
    elif not chosen.yes:
        print("`millrace clean --yes` removes them")
    return 0


def _parser(name: str, about: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"millrace {name}", description=about)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number ≥ 1, got {text}")
    return number


def _process_started() -> float:
    """Epoch seconds at which this process was started."""
    import psutil

    return float(psutil.Process().create_time())


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": _train,
    "eval": _eval,
    "report": _report,
    "export": _export,
    "audit": _audit,
    "replay": _replay,
    "bench": _bench,
    "clean": _clean,
    **{name: _control(name) for name in ("status", "scale", "checkpoint", "stop", "logs")},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # A user's own environment or verifier is a module in the folder they stand in.
    sys.path.insert(0, os.getcwd())
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else 2
    command = COMMANDS.get(words[0])
    if command is None:
        close = nearest(words[0], COMMANDS)
        print(f"millrace: no such command: {words[0]}" + (f"; did you mean {close}?" if close else ""), file=sys.stderr)
        return 2
    try:
        return command(words[1:])
    except (ConfigError, ValueError, FileExistsError, FileNotFoundError) as error:
        print(f"millrace: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError) as error:
        print(f"millrace: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("millrace: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
