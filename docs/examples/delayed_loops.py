# %% [markdown]
# # Loops with dask.delayed
#
# A loop over independent pieces of work is the first thing that people make parallel. This one counts the primes below a
# limit: each turn of the loop takes one interval, and a tree of sums adds the counts up.

# %%
import dask
import numpy as np
from engines import compare, size

from zmqtasks import Client

LIMIT = size(200_000, 3_000_000)
WIDTH = LIMIT // 64

# %% [markdown]
# ## The functions
#
# They are plain Python, and know nothing of dask. Looking for divisors takes longer the larger the numbers are, so the turns
# of the loop are not equally long.


# %%
def count_primes(start, stop):
    return sum(is_prime(number) for number in range(start, stop))


def is_prime(number):
    if number < 4:
        return number > 1
    return number % 2 > 0 and all(number % divisor for divisor in range(3, int(number**0.5) + 1, 2))


def add(left, right):
    return left + right


# %% [markdown]
# ## The loop
#
# `dask.delayed(f)(x)` does not call `f`: it gives a promise of the result, which can be an argument of further calls. Nothing
# runs before `compute()`; what can run at the same time then does. Loops and conditions of Python work as always: this one
# leaves out intervals that hold no numbers, and adds neighbours until one sum is left.


# %%
def primes_below_limit():
    counts = []
    for start in range(0, LIMIT, WIDTH):
        stop = min(start + WIDTH, LIMIT)
        if start < stop:
            counts.append(dask.delayed(count_primes)(start, stop))
    while len(counts) > 1:
        pairs = [dask.delayed(add)(left, right) for left, right in zip(counts[::2], counts[1::2], strict=False)]
        counts = pairs + counts[2 * len(pairs) :]
    return counts[0].compute()


# %% [markdown]
# ## On a cluster
#
# A client starts a cluster on this machine. While it is open, every `compute()` runs there.

# %%
client = Client(n_workers=2, threads_per_worker=1)
print(f"answer: {primes_below_limit()} primes below {LIMIT}")

# %% [markdown]
# ## Is it right, and what does it take?
#
# A sieve with numpy finds the same primes in another way. The threads of one process wait for each other here: Python code
# holds the interpreter's lock, and only processes get past that.

# %%
sieve = np.ones(LIMIT, dtype=bool)
sieve[:2] = False
for number in range(2, int(LIMIT**0.5) + 1):
    sieve[number * number :: number] = False
expected = int(sieve.sum())

compare(primes_below_limit, expected, client)
