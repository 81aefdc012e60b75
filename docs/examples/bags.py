# %% [markdown]
# # Bags: counting words
#
# A bag is a collection of any Python objects without an order, such as the lines of text files. This example writes some
# files of words and finds the most frequent ones.

# %%
import random
import tempfile
from collections import Counter
from pathlib import Path

import dask.bag as db
from engines import compare, size

from zmqtasks import Client

FILES = 16
LINES = size(3_000, 40_000)
SYLLABLES = ("ba", "co", "di", "fu", "ka", "lo", "mi", "nu", "ra", "se")

# %% [markdown]
# ## The data
#
# Words of one to three syllables, short ones more often.

# %%
scratch = tempfile.TemporaryDirectory()
folder = Path(scratch.name)
chance = random.Random(5)
vocabulary = ["".join(chance.choices(SYLLABLES, k=chance.randint(1, 3))) for _ in range(1_000)]
weights = [1 / (1 + rank) for rank in range(len(vocabulary))]
for number in range(FILES):
    words = iter(chance.choices(vocabulary, weights, k=LINES * 10))
    lines = (" ".join(next(words) for _ in range(10)).capitalize() + "." for _ in range(LINES))
    (folder / f"text-{number:02}.txt").write_text("\n".join(lines) + "\n")

# %% [markdown]
# ## The question
#
# One partition per file. `frequencies` counts within each partition, then adds the counts of partitions up; `topk` keeps the
# most frequent. When counts are equal, the alphabet decides, so that there is one right answer.


# %%
def most_frequent():
    lines = db.read_text(folder / "text-*.txt")
    words = lines.map(str.lower).map(str.replace, ".", "").map(str.split).flatten()
    return words.frequencies().topk(5, key=by_count).compute()


def by_count(item):
    word, count = item
    return count, word


# %% [markdown]
# ## On a cluster

# %%
client = Client(n_workers=2, threads_per_worker=1)
print("answer: " + ", ".join(f"{word} {count} times" for word, count in most_frequent()))

# %% [markdown]
# ## Is it right, and what does it take?
#
# A `Counter` of all words of all files. This is Python code, so the threads of one process wait for each other, and dask does
# not run bags on them unless it is told to.

# %%
counts = Counter()
for path in folder.iterdir():
    counts.update(path.read_text().lower().replace(".", "").split())
expected = sorted(counts.items(), key=by_count, reverse=True)[:5]

compare(most_frequent, expected, client)

# %%
scratch.cleanup()
