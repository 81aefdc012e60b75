"""`zmqtasks bench net` on this machine, in processes as a user has them; only that it works, never how fast."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import psutil
import pytest
from click.testing import CliRunner

from bench.network import baselines_zmq
from bench.network.command import write
from bench.network.data_links import CONTENTS, measure_data, value
from bench.network.document import Report, Subject, read_json
from bench.network.figures import KIB, MIB, RATES, Plan
from bench.network.links import measure_link
from bench.network.subjects import Measured, compared, find_subjects
from bench.network.suite import Runner, Suite, full, measure_together, quick, run
from bench.network.turns import BANDWIDTH
from bench.network.worker import Task, answer
from zmqtasks.cli.bench import bench
from zmqtasks.errors import CommError
from zmqtasks.transports import get_transport

PLAN = Plan(sizes=(1, 64 * KIB), latency_sizes=(1,), round_trips=20, time_s=0.005, peers=2, batch=10)
DEADLINE_S = 60


def bench_net(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "zmqtasks", "bench", "net", "--quick", *arguments]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0,
        env={**os.environ, "COLUMNS": "150"},
    )  # fmt: skip


@pytest.mark.parametrize("scheme", ["inproc", "shm", "unix", "tcp", "zmq"])
def test_all_kinds_of_figures(scheme):
    figures = measure_link(scheme, False, PLAN)
    assert figures.latency_us[1].count > 0
    assert set(figures.bandwidth) == {1, 64 * KIB}
    assert set(figures.rates) == set(RATES)
    assert all(value > 0 for value in (*figures.bandwidth.values(), *figures.rates.values()))


@pytest.mark.parametrize(
    "task", [Task(scheme="tcp"), *(Task(module=f"baselines_{name}") for name in ("socket", "zmq"))]
)
def test_the_smallest_messages_have_time_for_the_tail(task):
    plan = Plan(sizes=(KIB,), latency_sizes=(1, 256 * KIB), round_trips=200, time_s=1e-6, tail_s=DEADLINE_S, rates=())
    figures = answer(task, plan).figures
    assert figures is not None
    assert figures.latency_us[1].count == 200
    assert figures.latency_us[1].p99 is not None
    assert figures.latency_us[256 * KIB].count < 200


@pytest.mark.parametrize("function", ["measure", "measure_unix"])
def test_sockets_are_a_baseline_of_what_goes_on_at_the_same_time_too(function):
    said = answer(Task(module="baselines_socket", function=function), PLAN)
    assert said.error == ""
    assert said.figures is not None
    assert set(said.figures.rates) == set(RATES) - {"batched_messages_per_s", "read_bytes_per_s"}
    assert all(value > 0 for value in said.figures.rates.values())


@pytest.mark.parametrize("scheme", ["tcp", "zmq"])
def test_encrypted_links(scheme):
    if not get_transport(scheme).capabilities.encrypts:
        pytest.skip(f"the transport {scheme!r} declares encrypts=False")
    figures = measure_link(scheme, True, Plan(sizes=(KIB,), time_s=0.005, round_trips=5, rates=("connects_per_s",)))
    assert figures.settings["encryption"] == "on"
    assert figures.bandwidth[KIB] > 0


def test_while_the_gil_is_held():
    plan = Plan(sizes=(KIB,), time_s=0.02, round_trips=5, rates=(), hold_gil=True)
    figures = measure_link("tcp", False, plan)
    assert figures.latency_us[1].count > 0
    assert figures.bandwidth[KIB] > 0


@pytest.mark.parametrize(("encrypted", "content"), [(False, "measurements"), (True, "noise")])
def test_data_links(encrypted, content):
    plan = Plan(sizes=(64 * KIB,), latency_sizes=(1,), time_s=0.005, round_trips=5)
    figures = measure_data("tcp", encrypted, "off", content, plan)
    assert figures.latency_us[1].count > 0
    assert figures.bandwidth[64 * KIB] > 0


def test_values_of_data_links_are_as_large_as_they_say():
    for size in (1, 8, 100, 64 * KIB, 16 * MIB + 8):
        for content in CONTENTS:
            assert size - 8 < sum(len(frame) for frame in value(size, content).frames) <= size + 300


def test_every_transport_between_hosts_has_its_data_links():
    measured, _ = find_subjects(("tcp", "unix"), ("off", "lz4"), encrypted_data=True)
    data = [each for each in measured if each.subject.kind == "data"]
    assert {each.task.scheme for each in data} == {"tcp"}
    kinds = {(each.task.encrypted, each.task.compression, each.task.content) for each in data}
    plain = {(False, "off", "measurements"), (False, "lz4", "measurements"), (False, "lz4", "noise")}
    both = plain | {(True, *rest) for _, *rest in plain}
    assert kinds == (both if get_transport("tcp").capabilities.encrypts else plain)
    assert len({each.subject.id for each in measured}) == len(measured)


def test_a_peer_that_dies_ends_the_measurement():
    def kill_the_peer() -> None:
        end = time.monotonic() + DEADLINE_S
        while time.monotonic() < end:
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.Error):
                    if "bench.network.peer" in child.cmdline() and child.net_connections():
                        child.kill()
                        return
            time.sleep(0.01)

    killer = threading.Thread(target=kill_the_peer)
    killer.start()
    with pytest.raises(CommError):
        measure_link("tcp", False, Plan(round_trips=10**9, time_s=DEADLINE_S))
    killer.join(DEADLINE_S)


def test_what_cannot_be_measured_is_left_out_with_the_reason():
    subject = Subject(id="x", name="x", kind="transport")
    with Runner(Measured(subject, Task(scheme="tcp", encrypted=False, module="no_such_module"))) as runner:
        measure_together([runner], PLAN)
        assert "not installed" in runner.failed
    said = answer(Task(scheme="nix"), PLAN)
    assert said.figures is None
    assert "no transport for 'nix'" in said.error


def runners(stack: contextlib.ExitStack, *tasks: Task) -> list[Runner]:
    subjects = [Subject(id=f"{number}", name="x", kind="transport") for number in range(len(tasks))]
    return [stack.enter_context(Runner(Measured(*each))) for each in zip(subjects, tasks, strict=True)]


def test_what_is_compared_is_measured_in_turns(monkeypatch):
    """The same figure of all at the same time; who has no such figure, or breaks, holds nobody up."""
    went_on = []
    go_on = Runner.go_on

    def noting(runner: Runner) -> None:
        went_on.append((runner.place, runner))
        go_on(runner)

    monkeypatch.setattr(Runner, "go_on", noting)
    with contextlib.ExitStack() as stack:
        memcpy, tcp, broken = together = runners(
            stack, Task(module="baseline_memcpy"), Task(scheme="tcp"), Task(module="no_such_module")
        )
        measure_together(together, replace(PLAN, rates=("messages_per_s",)))
    assert broken.failed
    assert not memcpy.failed
    assert not tcp.failed
    assert set(memcpy.measured.subject.idle.bandwidth) == set(tcp.measured.subject.idle.bandwidth) == {1, 64 * KIB}
    assert list(tcp.measured.subject.idle.rates) == ["messages_per_s"]
    places = [place for place, _ in went_on]
    assert places == sorted(places)
    for size in PLAN.sizes:
        turns = [runner for (kind, of), runner in went_on if (kind, of) == (BANDWIDTH, size)]
        last = min(len(turns) - 1 - turns[::-1].index(runner) for runner in (memcpy, tcp))
        assert all(one is not other for one, other in itertools.pairwise(turns[: last + 1]))


def test_plain_transports_share_the_turns_of_their_baselines():
    measured, _ = find_subjects(("inproc", "shm", "tcp"), ("off", "lz4"))
    groups = [[each.subject.id for each in group] for group in compared(measured)]
    assert ["memcpy", "inproc", "shm"] in groups
    assert ["raw-socket", "tcp"] in groups
    assert sorted(itertools.chain(*groups)) == sorted(each.subject.id for each in measured)
    assert all(len(group) == 1 for group in groups if group[0] not in ("memcpy", "raw-socket"))


@pytest.mark.parametrize(("scheme", "baseline"), [("tcp", "raw-socket"), ("unix", "raw-unix"), ("zmq", "raw-pyzmq")])
def test_baselines_stand_beside_their_transports(scheme, baseline):
    measured, _ = find_subjects((scheme,))
    ids = [each.subject.id for each in measured]
    assert ids.index(baseline) < ids.index(scheme)
    assert all(each.subject.baseline == baseline for each in measured if each.subject.kind == "transport")


def test_a_run_names_the_sizes_that_no_memory_is_there_for():
    suite = replace(quick([KIB, 1 << 43]), rounds=0)
    skipped = run(suite, ("inproc",), "").skipped
    assert [each.subject for each in skipped] == ["messages of 8192 GiB"]
    assert "no memory" in skipped[0].reason


@pytest.mark.parametrize("make", [quick, full])
def test_sizes_that_no_memory_is_there_for_are_left_out(make):
    suite: Suite = make([KIB, 1 << 50])
    assert suite.plan.sizes == (KIB,)
    assert suite.too_large == (1 << 50,)
    assert suite.gil_plan.sizes == (KIB,)


def test_a_run_with_all_files(tmp_path):
    files = ["--json", str(tmp_path / "a.json"), "--html", str(tmp_path / "a.html"), "--png", str(tmp_path / "plots")]
    process = bench_net(
        "--quick", "--transports", "tcp", "--sizes", "1KiB,64k", "--rounds", "1", "--compression", "off", *files
    )
    output, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, errors
    assert "Bandwidth" in output
    assert "raw TCP socket" in output
    report = read_json(tmp_path / "a.json")
    assert report.complete
    assert report.rounds == 1
    tcp = report.subject("tcp")
    assert tcp is not None
    assert {size: len(values) for size, values in tcp.idle.bandwidth.items()} == {KIB: 1, 64 * KIB: 1}
    assert tcp.gil.latency_us
    assert report.machine["packages"]["pyzmq"]
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    for secret in (os.uname().nodename, str(tmp_path)):
        assert secret not in text, "names of hosts, and of files, which may have names of people in them"
    assert "<svg" in (tmp_path / "a.html").read_text(encoding="utf-8")
    assert (tmp_path / "plots" / "bandwidth-tcp.png").exists()


def test_a_reader_who_leaves_early_gets_the_file_all_the_same(tmp_path):
    """As `| head` does, after minutes of measuring."""
    path = tmp_path / "a.json"
    process = bench_net("--quick", "--transports", "inproc", "--sizes", "1KiB", "--rounds", "1", "--json", str(path))
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stderr.close()
    process.wait(timeout=DEADLINE_S)
    assert read_json(path).complete


def is_measuring(suite: psutil.Process) -> bool:
    """Whether a worker has started a process of its own: the first figures are being taken."""
    with contextlib.suppress(psutil.NoSuchProcess):  # some processes just look at the machine
        return any(worker.children() for worker in suite.children())
    return False


@pytest.mark.parametrize("of_job", [False, True], ids=["SIGINT", "SIGTERM to all processes"])
def test_an_interruption_leaves_what_there_is_and_no_process(tmp_path, of_job):
    path = tmp_path / "a.json"
    process = bench_net("--transports", "tcp", "--rounds", "1000", "--json", str(path))
    try:
        parent = psutil.Process(process.pid)
        end = time.monotonic() + DEADLINE_S
        while not is_measuring(parent):
            assert time.monotonic() < end, "nothing is being measured"
            time.sleep(0.01)
        children = parent.children(recursive=True)
        if of_job:
            for child in children:
                child.terminate()
        process.send_signal(signal.SIGTERM if of_job else signal.SIGINT)
        if of_job:
            process.terminate()
        output, errors = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, errors
    assert "interrupted" in output
    assert "Traceback" not in errors
    report = json.loads(path.read_text(encoding="utf-8"))
    assert not report["complete"]
    assert not [each for each in report["skipped"] if "SIG" in str(each)]
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive


def test_nothing_is_left_of_a_run_that_did_not_begin(tmp_path):
    (tmp_path / "old.json").write_text("kept")
    files = ["--json", str(tmp_path / "old.json"), "--html", str(tmp_path / "a.html"), "--png", str(tmp_path / "plots")]
    process = bench_net("--scheduler", "nonsense", *files)
    process.communicate(timeout=DEADLINE_S)
    assert process.returncode != 0
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    assert (tmp_path / "old.json").read_text() == "kept"


def test_what_cannot_be_written_in_the_end_costs_no_other_file(tmp_path):
    written, failed = write(Report(), tmp_path / "gone" / "a.json", tmp_path / "a.html", tmp_path / "a.html" / "plots")
    assert written == [tmp_path / "a.html"]
    assert ["a.json" in failed[0], "plots" in failed[1]] == [True, True]


def test_help_names_defaults_and_baselines():
    text = " ".join(CliRunner().invoke(bench, ["net", "--help"]).output.split())
    for words in ("dask.distributed", "raw ucxx", "default: 8", "default: 3", "1MiB,16MiB,64MiB", "off,auto,lz4"):
        assert words in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--transports", "nix"], "there is no transport 'nix'"),
        (["--sizes", "7parsec"], "is not a size"),
        (["--json", "/nowhere/a.json"], "there is no folder /nowhere"),
        (["--json", "/dev/null/a.json"], "there is no folder /dev/null"),
        (["--compression", "gzip"], "there is no compression 'gzip'"),
        (["--png", "/dev/null/plots"], "plots cannot be written to /dev/null/plots"),
        (["--parallel", "--pairs", "3"], "--pairs, --parallel: for a cluster"),
        (["--scheduler", "tcp://127.0.0.1:1", "--rounds", "2"], "--rounds: for one machine"),
        (["--scheduler", "nonsense", "--key-file", "/nowhere/key"], "has no port"),
        (["--scheduler", "nix://a:1", "--key-file", "/nowhere/key"], "nix"),
    ],
)
def test_mistakes_are_told_at_once(arguments, words):
    process = bench_net(*arguments)
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode in (1, 2)
    assert words in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("mode", ["sink", "echo", "evented"])
def test_the_other_end_of_raw_pyzmq_has_started_before_it_is_measured(mode):
    """Or it does so while others have their turn, and takes a processor from them."""
    with baselines_zmq._ends(mode, False, 1):
        (other,) = psutil.Process().children()
        assert [each for each in other.net_connections() if each.status == psutil.CONN_ESTABLISHED]
