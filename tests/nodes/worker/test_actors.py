"""Results of actors: apart from what the actor goes on to change, without a copy where nobody can."""

from __future__ import annotations

import numpy as np
import pytest

from zmqtasks.nodes.worker import actors


class Owner:
    def __init__(self) -> None:
        self.array = np.zeros(10)
        self.rows = [np.zeros(3)]
        self.lock = __import__("threading").Lock()

    def new(self):
        return np.ones(10)

    def own(self):
        return self.array

    def view(self):
        return np.ones(10)[2:]

    def nested(self):
        return self.rows

    def text(self):
        return "x" * 100

    def not_to_be_pickled(self):
        return [self.lock]


def finish(value):
    return actors._as_it_is(value)


@pytest.mark.parametrize(
    ("method", "same"),
    [("new", True), ("own", False), ("view", False), ("nested", False), ("text", True), ("not_to_be_pickled", True)],
)
def test_a_result_is_copied_when_the_actor_may_still_change_it(method, same):
    owner = Owner()
    value = getattr(owner, method)()
    result = finish(value)
    assert (result is value) is same
    if method != "not_to_be_pickled":
        assert np.array_equal(result, value)
