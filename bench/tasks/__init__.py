"""The task suite: what a task costs, end to end and in the scheduler alone. `python -m bench.tasks --help`."""
