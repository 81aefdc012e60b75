"""joblib and scikit-learn on a cluster of processes."""

from __future__ import annotations

import gc
import os
import pickle
import threading
from collections.abc import Iterator

import joblib
import numpy as np
import pytest
from joblib import Parallel, delayed

from zmqtasks import Client, LocalCluster, get_worker
from zmqtasks.errors import ConfigError
from zmqtasks.integrations.joblib import ZmqTasksBackend


def square(n: int) -> int:
    return n * n


def where(_: int) -> tuple[int, str]:
    return os.getpid(), threading.current_thread().name


def nested(n: int) -> list[int]:
    return Parallel()(delayed(square)(i) for i in range(n))


def fail(n: int) -> int:
    if n == 7:
        raise KeyError(f"number {n}")
    return n


def identity_of(array: np.ndarray, _: int) -> tuple[int, float, str]:
    return id(array), float(array.sum()), get_worker().name


@pytest.fixture(autouse=True)
def backend(process_client: Client) -> Iterator[None]:
    with joblib.parallel_config("zmqtasks"):
        yield


def test_calls_run_on_the_workers():
    assert Parallel()(delayed(square)(n) for n in range(100)) == [n * n for n in range(100)]
    pids = {pid for pid, _ in Parallel(batch_size=1)(delayed(where)(n) for n in range(50))}
    assert len(pids) == 2
    assert os.getpid() not in pids


def test_all_threads_are_counted(process_client: Client):
    assert joblib.effective_n_jobs() == joblib.effective_n_jobs(-1) == 4
    assert joblib.effective_n_jobs(-2) == 3
    assert joblib.effective_n_jobs(2) == 2
    assert joblib.effective_n_jobs(-9) == 1


def test_calls_that_make_calls_do_not_wait_for_each_other():
    assert Parallel(n_jobs=8, batch_size=1)(delayed(nested)(n) for n in range(16)) == [
        [i * i for i in range(n)] for n in range(16)
    ]


def test_generators_and_batches():
    made = Parallel(return_as="generator")(delayed(square)(n) for n in range(20))
    assert list(made) == [n * n for n in range(20)]
    unordered = Parallel(return_as="generator_unordered", batch_size=3)(delayed(square)(n) for n in range(20))
    assert sorted(unordered) == sorted(n * n for n in range(20))


def test_errors_come_back_and_the_rest_is_given_up(process_client: Client, wait_until):
    with pytest.raises(KeyError, match="number 7"):
        Parallel(batch_size=1)(delayed(fail)(n) for n in range(1000))
    wait_until(lambda: gc.collect() >= 0 and not process_client.who_has())  # joblib leaves cycles behind after an error
    assert Parallel()(delayed(square)(n) for n in range(3)) == [0, 1, 4]


def test_a_large_argument_travels_once_to_each_worker(process_client: Client, wait_until):
    array = np.arange(200_000.0)
    found = Parallel(batch_size=1)(delayed(identity_of)(array, n) for n in range(40))
    assert {total for _, total, _ in found} == {array.sum()}
    for worker in {name for _, _, name in found}:
        assert len({number for number, _, name in found if name == worker}) <= 2  # a copy per worker, not one per call
    wait_until(lambda: not process_client.who_has())


def test_given_data_is_scattered_to_all_workers_beforehand(wait_until, process_client: Client):
    table = list(range(1000))
    with joblib.parallel_config("zmqtasks", scatter=[table]):
        assert Parallel()(delayed(sum)(table) for _ in range(4)) == [sum(table)] * 4
    wait_until(lambda: not process_client.who_has())
    with pytest.raises(ConfigError, match="scatter is dict"), joblib.parallel_config("zmqtasks", scatter={}):
        pass


def test_options_of_submit_and_another_client(process_cluster: LocalCluster):
    with (
        Client(process_cluster, set_as_default=False) as other,
        joblib.parallel_config("zmqtasks", client=other, resources={"licence": 1}, n_jobs=2),
    ):
        assert Parallel()(delayed(square)(n) for n in range(5)) == [0, 1, 4, 9, 16]


def test_the_backend_can_be_pickled():
    copy = pickle.loads(pickle.dumps(ZmqTasksBackend(scatter=[1], nesting_level=2)))
    assert copy.nesting_level == 2


def test_a_grid_search_of_scikit_learn(process_client: Client):
    from sklearn.datasets import make_classification
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV

    x, y = make_classification(n_samples=2000, n_features=20, random_state=3)
    search = GridSearchCV(LogisticRegression(max_iter=200), {"C": [0.01, 0.1, 1.0]}, cv=3, n_jobs=-1)
    search.fit(x, y)
    with joblib.parallel_config("sequential"):
        alone = GridSearchCV(LogisticRegression(max_iter=200), {"C": [0.01, 0.1, 1.0]}, cv=3).fit(x, y)
    assert search.best_params_ == alone.best_params_
    np.testing.assert_allclose(search.cv_results_["mean_test_score"], alone.cv_results_["mean_test_score"])
