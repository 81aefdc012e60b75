# %% [markdown]
# # Asynchronous optimisation
#
# Here the work is not known beforehand: each result decides what is computed next. Futures make that easy: `as_completed`
# gives results as they come, and takes further futures meanwhile. No worker waits for the slowest one of a round.
#
# The task: a weight on a spring was watched while it came to rest. How stiff is the spring, and how strong the friction?

# %%
import concurrent.futures
import itertools

import distributed
import numpy as np
from engines import WORKERS, compare, size

import zmqtasks
from zmqtasks import Client

STEPS = size(15_000, 200_000)
TRUTH = (4.2, 0.35)

# %% [markdown]
# ## What one evaluation is
#
# A simulation with some stiffness and friction, and how far it is from what was seen: a few milliseconds of Python. What was
# seen is a simulation too, so that the answer is known.


# %%
def simulate(stiffness, friction):
    position, speed, step = 1.0, 0.0, 10 / STEPS
    positions = []
    for _ in range(STEPS):
        speed -= step * (stiffness * position + friction * speed)
        position += step * speed
        positions.append(position)
    return np.array(positions)


def misfit(point, seen):
    return float(np.mean((simulate(*point) - seen) ** 2))


seen = simulate(*TRUTH)

# %% [markdown]
# ## The search
#
# It begins with a coarse grid of points. Around the best point so far lies a ring of eight others. When one of them is
# better, the ring moves there, without waiting for the rest; when all of them are in and none is better, the next ring is
# half as wide. Late points of former rings still count.
#
# `pool` is a client or anything else with `submit`; `as_completed` comes along, since each kind of future has its own.


# %%
def search(pool, as_completed, seen):
    completed = as_completed([])
    asked = {}  # by future: its point
    values = {}  # by point
    best, step, ring = None, 0.5, set()

    def ask(points):
        for point in points - set(asked.values()):
            future = pool.submit(misfit, point, seen)
            asked[future] = point
            completed.add(future)
        return points - set(values)

    ask(set(itertools.product((1.0, 3.0, 5.0, 7.0), (0.2, 0.6, 1.0))))
    for future in completed:
        point = asked[future]
        values[point] = future.result()
        ring.discard(point)
        if best is None or values[point] < values[best]:
            best = point
            ring = ask(around(best, step))
        while not ring and step > 1e-4:
            step /= 2
            ring = ask(around(best, step))
    return best


def around(point, step):
    moves = set(itertools.product((-step, 0, step), repeat=2)) - {(0, 0)}
    return {(point[0] + across, point[1] + up / 4) for across, up in moves}


# %% [markdown]
# ## On a cluster
#
# `seen` goes to the workers once, by `scatter`, instead of with each task. (Of a list, `scatter` would make a future of each
# element.)

# %%
client = Client(n_workers=2, threads_per_worker=1)


def on_zmqtasks():
    return search(client, zmqtasks.as_completed, client.scatter(seen, broadcast=True))


stiffness, friction = on_zmqtasks()
print(f"answer: stiffness {stiffness:.3f}, friction {friction:.3f}")

# %% [markdown]
# ## Is it right, and what does it take?
#
# dask's threads have no futures, so `concurrent.futures` takes their place. Its `as_completed` takes no further futures; a
# few lines give it that. The evaluation is Python code, for which the threads of one process wait for each other.


# %%
class GrowingAsCompleted:
    """`as_completed` of concurrent.futures, with `add`."""

    def __init__(self, futures):
        self.waiting = set(futures)

    def add(self, future):
        self.waiting.add(future)

    def __iter__(self):
        while self.waiting:
            done, self.waiting = concurrent.futures.wait(self.waiting, return_when="FIRST_COMPLETED")
            yield from done


def on_threads():
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        return search(pool, GrowingAsCompleted, seen)


def on_distributed():
    client = distributed.default_client()
    # hash=False: data that comes again by the same name, just after it was let go of, can get lost there.
    return search(client, distributed.as_completed, client.scatter(seen, broadcast=True, hash=False))


compare(
    on_zmqtasks,
    expected=np.array(TRUTH),
    client=client,
    threads=on_threads,
    threads_are="concurrent.futures threads",
    distributed=on_distributed,
    tolerance=2e-3,
)
