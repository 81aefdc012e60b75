"""zmqtasks: futures and task graphs on a cluster, over pluggable transports."""

__version__ = "0.1.0"
