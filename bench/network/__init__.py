"""What the network gives: every transport beside what it stands on, measured in one run (`zmqtasks bench net`).

Theory of operation
-------------------
A *subject* is something to measure: a transport with or without encryption and compression, or a baseline (a raw
socket, raw pyzmq, `memcpy`, ...). Each subject is measured in a process of its own (`worker.py`), which starts the
processes at the other end; `suite.py` takes the subjects in turn, round after round, so that whatever else happens on
the machine hits all of them. All rounds of every figure go into one JSON document, of which the table, the HTML report
and `compare` are made.

The folder is `bench/network` in a checkout and `zmqtasks_bench/network` in a wheel: modules here import each other
relatively, and start each other by `__package__`.
"""
