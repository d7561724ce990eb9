"""What judges completions: verifiers, and the processes that they run in."""
