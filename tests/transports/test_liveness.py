"""The silence clock as a table: what TCP_INFO said at each look, and when the link counts as cut."""

from __future__ import annotations

import pytest

from zmqtasks.transports.liveness import SilenceClock

HEARTBEAT_S = 6.0
# (now, unacked, probes, age of the last acknowledgement)
Looks = list[tuple[float, int, int, float]]


@pytest.mark.parametrize(
    ("looks", "cut"),
    [
        pytest.param([(t, 0, 0, 100.0 + t) for t in range(60)], None, id="idle: left to the keep-alives"),
        pytest.param([(t, 3, 0, 0.1) for t in range(60)], None, id="busy and answered"),
        pytest.param([(t, 3, 0, 100.0 + t) for t in range(60)], 5, id="data in flight after a long idle time"),
        pytest.param([(t, 1, 0, float(t)) for t in range(60)], 5, id="data in flight, then silence"),
        pytest.param([(t, 0, 1, float(t)) for t in range(60)], None, id="one lost probe proves nothing"),
        pytest.param([(t, 0, 2, float(t)) for t in range(60)], 5, id="probes of a closed window unanswered"),
        pytest.param([(t, 1, 0, 4.0 if t == 4 else t % 4) for t in range(60)], None, id="slow, but answered"),
        pytest.param([(0, 1, 0, 0.0), (30, 1, 0, 29.9)], None, id="our own loop lagged; answered meanwhile"),
        pytest.param([(0, 1, 0, 0.0), (30, 1, 0, 30.0)], 30, id="our own loop lagged; silence all the time"),
    ],
)
def test_silence(looks: Looks, cut: float | None) -> None:
    clock = SilenceClock(HEARTBEAT_S)
    first = next((look[0] for look in looks if clock.is_cut(*look)), None)
    assert first == cut
