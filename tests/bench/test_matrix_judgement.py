"""Which hosts and links of a matrix are called slow: matrices made up for the purpose."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import pytest

from bench.network.document import Matrix, Report
from bench.network.matrix_parts import link_of, nothing_found, size_of_all_at_once
from bench.network.matrix_tables import matrix_sections
from bench.network.pairs import Link, choose_pairs, choose_workers, host_labels, next_free, unique_labels
from bench.network.remarks import compare_hosts
from bench.network.slow import judge

GOOD = 1.2e9
QUICK = 80.0


def matrix(count, change=lambda a, b: {}, pairs=None, noise=0.05, seed=1):
    """Links between workers w0, w1, ... that differ by chance, but for what `change` gives."""
    chance = random.Random(seed)
    made = []
    for a, b in pairs or itertools.permutations(range(count), 2):
        figures = {
            "bandwidth": GOOD * chance.uniform(1 - noise, 1 + noise),
            "latency_us": QUICK * chance.uniform(1 - noise, 1 + noise),
        }
        made.append(Link(source=a, target=b, transport="tcp", **{**figures, **change(a, b)}))
    return made


def names(count, what="w"):
    return [f"{what}{i}" for i in range(count)]


def judged(count, links, hosts=None):
    return judge(names(count), hosts or names(count, "h"), links)


def said(findings):
    return [(f.kind, *f.names, f.metric, f.direction) for f in findings]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 16])
@pytest.mark.parametrize("noise", [0.0, 0.05, 0.15])
def test_a_network_without_faults_has_no_findings(count, noise):
    assert judged(count, matrix(count, noise=noise)) == []


@pytest.mark.parametrize("count", [3, 4, 5, 16])
def test_a_slow_host_is_named_and_nothing_else(count):
    links = matrix(count, lambda a, b: {"bandwidth": 12e6} if 1 in (a, b) else {})
    findings = judged(count, links)
    assert said(findings) == [("host", "h1", "bandwidth", "both")]
    assert 90 < findings[0].factor < 110
    for word in ("h1", "worker w1", "12.0 MB/s", " GB/s between the others", "sends and receives"):
        assert word in findings[0].text


@pytest.mark.parametrize(("direction", "end"), [("sending", 0), ("receiving", 1)])
def test_a_host_that_is_slow_in_one_direction(direction, end):
    links = matrix(5, lambda a, b: {"bandwidth": GOOD / 4} if (a, b)[end] == 2 else {})
    findings = judged(5, links)
    assert said(findings)[0] == ("host", "h2", "bandwidth", direction)
    assert {f.kind for f in findings} <= {"host", "asymmetry"}


def test_a_host_that_is_slow_each_way_in_its_own_measure_is_named_once():
    """What it receives is told only when what it and others send is out of the way."""

    def change(a, b):
        slow = {(2, "sends"): 10, (2, "receives"): 2, (3, "sends"): 2, (4, "sends"): 4}
        share = max(slow.get((a, "sends"), 1), slow.get((b, "receives"), 1))
        return {"bandwidth": GOOD / share * math.exp(chance.gauss(0, 0.1))}

    chance = random.Random(50)
    found = [f for f in judged(8, matrix(8, change)) if "h2" in f.names and f.kind == "host"]
    assert said(found) == [("host", "h2", "bandwidth", "both")]
    assert "in what it sends, " in found[0].text
    assert "in what it receives, " in found[0].text


def test_a_host_that_is_slow_to_answer():
    links = matrix(4, lambda a, b: {"latency_us": 5_000.0} if 3 in (a, b) else {})
    findings = judged(4, links)
    assert said(findings) == [("host", "h3", "latency", "both")]
    assert "5.00 ms" in findings[0].text


def test_several_slow_hosts_are_all_named_the_worst_first():
    slow = {1: 10e6, 4: 100e6}
    links = matrix(6, lambda a, b: {"bandwidth": min(slow.get(a, GOOD), slow.get(b, GOOD))})
    assert said(judged(6, links)) == [("host", "h1", "bandwidth", "both"), ("host", "h4", "bandwidth", "both")]


def test_a_slow_link_is_named_and_not_its_hosts():
    links = matrix(5, lambda a, b: {"bandwidth": GOOD / 10} if {a, b} == {1, 3} else {})
    findings = judged(5, links)
    assert [(f.kind, set(f.names)) for f in findings] == [("link", {"w1", "w3"})]
    assert "between" in findings[0].text


def test_a_link_that_is_slow_one_way_is_asymmetric_too():
    links = matrix(5, lambda a, b: {"bandwidth": GOOD / 10} if (a, b) == (1, 3) else {})
    findings = judged(5, links)
    assert [(f.kind, f.names) for f in findings] == [("link", ["w1", "w3"]), ("asymmetry", ["w1", "w3"])]
    assert "from w1 to w3" in findings[0].text


def test_of_two_workers_only_the_difference_between_the_ways_can_be_told():
    assert judged(2, matrix(2, lambda a, b: {"bandwidth": 1e6})) == []
    findings = judged(2, matrix(2, lambda a, b: {"bandwidth": GOOD / 3} if a == 0 else {}))
    assert [(f.kind, f.names) for f in findings] == [("asymmetry", ["w0", "w1"])]


def in_racks(sizes, ratio, slow=None, pairs=None):
    """Racks of so many hosts, between which bandwidth is divided by `ratio`; `slow`: hosts, and what theirs is divided by."""
    rack = [number for number, size in enumerate(sizes) for _ in range(size)]
    chance = random.Random(2)

    def change(a, b):
        share = max(1 if rack[a] == rack[b] else ratio, *((slow or {}).get(end, 1) for end in (a, b)))
        return {"bandwidth": GOOD / share * chance.uniform(0.9, 1.1)}

    return matrix(len(rack), change, pairs)


@pytest.mark.parametrize(
    ("sizes", "ratio", "slow"),
    [
        ((20, 20), 2, {7: 10}),
        ((20, 20), 2, {7: 3, 33: 3}),
        ((50, 50), 2, {7: 10}),
        ((20, 20), 3, {7: 50}),
        ((12, 4), 5, {13: 10}),
        ((8, 8), 5, {}),
        ((4, 4, 4, 4), 5, {}),
        ((12, 4), 5, {}),
    ],
)
def test_racks_are_told_and_slow_hosts_among_them(sizes, ratio, slow):
    count = sum(sizes)
    groups, *rest = judged(count, in_racks(sizes, ratio, slow))
    assert (groups.kind, groups.metric) == ("groups", "bandwidth")
    assert ratio * 0.9 < groups.factor < ratio * 1.1
    assert [len(group) for group in groups.groups] == [
        size - sum(sum(sizes[:number]) <= host < sum(sizes[: number + 1]) for host in slow)
        for number, size in enumerate(sizes)
    ]
    assert {(f.kind, *f.names, f.direction) for f in rest} == {("host", f"h{host}", "both") for host in slow}


@pytest.mark.parametrize("seed", range(3))
def test_of_a_sample_no_healthy_host_is_named(seed):
    """Its rack may be among the hosts that it was not measured with."""
    sizes = (20,) * 5
    findings = judged(100, in_racks(sizes, 3, {7: 50}, choose_pairs(100, seed=seed)))
    assert [f.names for f in findings if f.kind != "groups"] == [["h7"]]
    assert len(findings[0].groups) >= 5


def test_groups_that_cannot_reach_each_other_are_judged_all_the_same():
    def change(a, b):
        if (a < 5) != (b < 5):
            return {"bandwidth": None, "latency_us": None, "error": "ConnectTimeoutError: nobody there"}
        return {"bandwidth": GOOD / 10} if 2 in (a, b) else {}

    findings = [f for f in judged(10, matrix(10, change)) if f.kind != "failed"]
    assert said(findings) == [("host", "h2", "bandwidth", "both")]


def test_the_better_half_says_that_the_other_half_is_slow():
    links = matrix(8, lambda a, b: {"bandwidth": GOOD / 10} if max(a, b) > 3 else {})
    findings = judged(8, links)
    assert {(f.kind, *f.names) for f in findings} == {("host", f"h{number}") for number in range(4, 8)}
    assert all(9 < f.factor < 11 for f in findings)


def test_a_slow_host_is_named_though_the_others_differ_much():
    chance = random.Random(3)
    links = matrix(12, lambda a, b: {"bandwidth": GOOD * math.exp(chance.gauss(0, 0.6)) / (8 if 3 in (a, b) else 1)})
    assert ("host", "h3", "bandwidth", "both") in said(judged(12, links))


def test_nothing_found_in_links_of_several_kinds_is_not_all_well():
    links = matrix(8, lambda a, b: {"bandwidth": GOOD / 10} if max(a, b) > 2 else {})
    findings = judged(8, links)
    assert [f.kind for f in findings] == ["note"]
    assert "of several kinds" in findings[0].text


def test_too_few_pairs_are_not_too_few_workers():
    assert nothing_found([]) == []
    assert "two workers" in nothing_found(matrix(2))[0]
    assert nothing_found(matrix(3, pairs=[(0, 1), (1, 0), (1, 2), (2, 1)])) == [
        "3 workers, but only 2 pairs of them were measured: too few to compare"
    ]
    assert "no link is slow" in nothing_found(matrix(3))[0]


def test_what_99_of_100_round_trips_stay_within():
    answer = {"error": "", "latency_s": [number * 1e-6 for number in range(1, 101)]}
    link = link_of((0, 1), answer)
    assert (link.latency_us, link.latency_p99_us) == pytest.approx((50, 99))
    answer["latency_s"].pop()
    assert link_of((0, 1), answer).latency_p99_us is None


@pytest.mark.parametrize(
    ("workers", "memory_limit", "expected"),
    [
        (2, 0, 64),
        (8, 0, 64),
        (9, 0, 64),
        (10, 0, 16),
        (200, 0, 1),
        (1000, 0, 1),
        (3, 1024, 64),
        (3, 512, 16),
        (3, 4, 1),
    ],
)
def test_values_of_pairs_that_all_run_at_once_fit_together(workers, memory_limit, expected):
    info = {str(number): {"memory_limit": memory_limit << 20} for number in range(workers)}
    pairs = list(itertools.permutations(range(workers), 2))
    assert size_of_all_at_once((1 << 20, 16 << 20, 64 << 20), info, pairs) == expected << 20


def test_the_sums_of_hosts_under_load_are_shown():
    links = matrix(4, lambda a, b: {"bandwidth": 1e9})
    hosts = ["a", "a", "b", "c"]
    document = Matrix(
        workers=names(4), hosts=hosts, links=links, facts={"together": True, "sizes": [16 << 20]},
        bandwidth=[[None] * 4] * 4, latency_us=[[None] * 4] * 4,
    )  # fmt: skip
    section = next(each for each in matrix_sections(Report(matrix=document)) if each.title == "Hosts under load")
    assert section.rows[0] == ["a", "4.00 GB/s", "4.00 GB/s", "2.00 GB/s"]
    assert "16 MiB" in section.about
    document.facts["together"] = False
    assert "Hosts under load" not in [each.title for each in matrix_sections(Report(matrix=document))]


def test_missing_pairs_do_not_hide_a_slow_host():
    pairs = choose_pairs(12, 36)
    links = matrix(12, lambda a, b: {"bandwidth": GOOD / 20} if 5 in (a, b) else {}, pairs)
    assert said(judged(12, links)) == [("host", "h5", "bandwidth", "both")]


def test_pairs_without_figures_are_failures():
    broken = {"bandwidth": None, "latency_us": None, "error": "ConnectTimeoutError: nobody there"}
    findings = judged(4, matrix(4, lambda a, b: broken if 2 in (a, b) else {}))
    assert [(f.kind, f.names) for f in findings] == [("failed", ["w2"])]
    assert "h2" in findings[0].text
    assert "nobody there" in findings[0].text
    findings = judged(4, matrix(4, lambda a, b: broken if (a, b) == (0, 1) else {}))
    assert [(f.kind, f.names) for f in findings] == [("failed", ["w0", "w1"])]
    assert len(judged(2, matrix(2, lambda a, b: broken))) == 2


def test_within_hosts_and_between_them_is_compared_apart():
    hosts = ["a", "a", "b", "b", "c", "c"]
    links = matrix(6, lambda a, b: {"bandwidth": 8e9, "latency_us": 30.0} if hosts[a] == hosts[b] else {})
    assert judged(6, links, hosts) == []


def test_a_host_of_several_workers_and_a_single_slow_worker():
    hosts = [host for host in "abcd" for _ in range(3)]
    slow_host = matrix(12, lambda a, b: {"bandwidth": GOOD / 5} if (hosts[a] == "b") != (hosts[b] == "b") else {})
    assert said(judged(12, slow_host, hosts)) == [("host", "b", "bandwidth", "both")]
    slow_worker = matrix(12, lambda a, b: {"latency_us": 900.0} if 4 in (a, b) else {})
    assert ("worker", "w4", "latency", "both") in said(judged(12, slow_worker, hosts))
    assert not [f for f in judged(12, slow_worker, hosts) if f.kind == "host"]


def test_many_slow_links_are_counted_not_listed():
    links = matrix(20, lambda a, b: {"bandwidth": GOOD / 9} if b == (a + 1) % 20 else {})
    findings = [f for f in judged(20, links) if f.kind == "link"]
    assert len(findings) == 11
    assert "10 more links" in findings[-1].text


def test_links_of_another_kind_are_remarked_on():
    links = matrix(4)
    links[0].encrypted = True
    findings = judged(4, links)
    assert [f.kind for f in findings] == ["note"]
    assert "11 x tcp; 1 x tcp, encrypted (as from w0 to w1)" in findings[0].text


def test_interfaces_unlike_those_of_the_others_are_remarked_on():
    hosts = {name: {"interface": "eth0", "mtu": 9000, "mbit_per_s": 25_000} for name in "abc"}
    assert compare_hosts(hosts) == []
    hosts["d"] = {"interface": "eno1", "mtu": 1500, "mbit_per_s": 1_000}
    texts = [f.text for f in compare_hosts(hosts)]
    assert len(texts) == 2
    assert all("eno1 of host d" in text for text in texts)
    assert "1500" in texts[0]


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 4, 5, 9, 10, 33])
def test_all_pairs_and_samples(workers):
    everything = choose_pairs(workers, 10**6)
    assert sorted(everything) == sorted(itertools.permutations(range(workers), 2))
    for count in (1, workers, 2 * workers, 5 * workers):
        sample = choose_pairs(workers, count)
        assert set(sample) <= set(everything)
        assert len(sample) <= max(count, workers) + 1
        assert all((b, a) in sample for a, b in sample)
        times = Counter(itertools.chain.from_iterable(sample))
        if workers > 1:
            assert len(times) == workers
            assert max(times.values()) <= min(times.values()) + 4


def test_every_host_of_a_large_cluster_is_there():
    hosts = [f"h{i % 7}" for i in range(1000)] + ["alone"]
    chosen = choose_workers(hosts, 50)
    assert len(chosen) <= 50
    assert {hosts[i] for i in chosen} == set(hosts)
    assert choose_workers([f"h{i}" for i in range(300)], 50) == list(range(300))


def test_pairs_that_run_together_have_no_host_in_common():
    hosts = ["a", "a", "b", "c", "d"]
    pending = choose_pairs(5)
    busy: set[str] = set()
    while (pair := next_free(pending, hosts, busy, Counter())) is not None:
        assert not busy & {hosts[pair[0]], hosts[pair[1]]}
        busy |= {hosts[pair[0]], hosts[pair[1]]}
        pending.remove(pair)
    assert len(busy) >= 3
    assert next_free([(0, 1), (2, 3)], hosts, (), Counter({0: 2})) == (2, 3)


def test_labels():
    assert unique_labels(["x", "", "y", "y"], ["a", "b", "c", "d"]) == ["x", "b", "c", "d"]
    assert host_labels(["n", "n", "m"], ["10.0.0.1", "10.0.0.2", ""]) == ["n (10.0.0.1)", "n (10.0.0.2)", "m"]
