"""Head, processes, command line: what makes a run of the parts. `from cluster import train` does what `millrace train` does."""

from cluster.api import Run, train

__all__ = ["Run", "train"]
