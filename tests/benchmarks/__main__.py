"""`python -m tests.benchmarks NAME [CONFIG] [--SETTING VALUE …] [--seconds S] [--json]`: what `millrace bench` runs."""

from __future__ import annotations

import json
import sys

from cluster.cli import UsageError, split_words
from tests.benchmarks import run_benchmark


def main() -> int:
    name, *words = sys.argv[1:]
    try:
        split = split_words(words, valued=["--seconds"], bare=["--json"])
        given = split.options.get("--seconds")
        try:
            seconds = None if given is None else float(given)
        except ValueError:
            raise UsageError(f"--seconds expects a number of seconds, got {given!r}") from None
        found = run_benchmark(name, split.config, split.settings, seconds=seconds)
    except ValueError as error:
        print(f"millrace: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError) as error:
        print(f"millrace: {error}", file=sys.stderr)
        return 1
    if "--json" in split.options:
        print(json.dumps(found))
    else:
        for key, value in found.items():
            print(f"{key:<28} {value:.4g}" if isinstance(value, float) else f"{key:<28} {value}")
    return 0


sys.exit(main())
