"""Published datasets: collections, futures and small objects that stay on the cluster under a name, whoever comes and goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import TYPE_CHECKING, Any, Final, cast

from zmqtasks.errors import ZmqTasksError
from zmqtasks.named import Request, SharedValue, ask, opened, take_over
from zmqtasks.nodes.client.names import UserKey, to_user, to_wire_name
from zmqtasks.protocol.ops import DeleteValue, GetValue, ListValues, Op, SetValue

if TYPE_CHECKING:
    from zmqtasks.client import Client

_KIND = "dataset"


class NoDefault:
    """Stands for a default that was not given."""


NO_DEFAULT: Final = NoDefault()


class Publishing:
    """Methods of a client that publish datasets. With an asynchronous client each gives a coroutine."""

    def _called_asynchronously(self) -> bool:
        raise NotImplementedError

    def _ask_for_dataset(self, make: Callable[[int], Op], then: Callable[[Request, Any], Any]) -> Any:
        return ask(cast("Client", self), make, then, ZmqTasksError)

    def publish_dataset(self, *args: Any, name: Any = None, override: bool = False, **kwargs: Any) -> Any:
        """Puts objects under names for all clients of the cluster, until they are unpublished: `name=object`, or one with `name=`.

        An object is a dask collection, a future, or anything small; futures inside stay alive, so a collection is to be
        persisted first, and large data scattered.

        Raises KeyError when there is a dataset of that name already, unless `override`: what was named before it is published
        then. PayloadTooLargeError for data that should be scattered: nothing is published.

        >>> client.publish_dataset(numbers=client.scatter([1, 2, 3], hash=False))
        >>> client.list_datasets()
        ('numbers',)
        """
        if (name is None) != (not args) or len(args) > 1:
            raise ValueError("publish_dataset: give one object with `name=...`, or keywords `name=object`")
        client = cast("Client", self)
        objects = {**kwargs, **({name: args[0]} if args else {})}
        shared = [
            (key, to_wire_name(key), SharedValue(client, value, f"the dataset {key!r}"))
            for key, value in objects.items()
        ]

        def publish(key: Any, wire: str, value: SharedValue) -> Any:
            def then(request: Request, done: Any) -> None:
                if not done:
                    raise KeyError(f"there is a dataset {key!r} already: override=True replaces it")

            def make(number: int) -> SetValue:
                return SetValue(number, _KIND, wire, value.data, value.keys, not override)

            return self._ask_for_dataset(make, then)

        if client._called_asynchronously():
            return _one_by_one(publish, shared)
        for entry in shared:
            publish(*entry)
        return None

    def get_dataset(self, name: Any, default: Any = NO_DEFAULT) -> Any:
        """The dataset of that name; futures inside belong to this client. Raises KeyError when there is none, or gives `default`.

        >>> client.get_dataset("numbers")[0].result()
        1
        """
        client = cast("Client", self)

        def then(request: Request, answer: Any) -> Any:
            if answer is None:
                if default is NO_DEFAULT:
                    raise KeyError(f"there is no dataset {name!r}: see list_datasets()")
                return default
            data, held = answer
            return take_over(client, request, [data])[0] if held else opened(client, data)

        wire = to_wire_name(name)
        return self._ask_for_dataset(lambda number: GetValue(number, _KIND, wire, 0.0), then)

    def list_datasets(self) -> Any:
        """The names of all datasets, sorted.

        >>> client.list_datasets()
        ('numbers',)
        """
        return self._ask_for_dataset(lambda number: ListValues(number, _KIND), lambda request, names: _sorted(names))

    def unpublish_dataset(self, name: Any) -> Any:
        """Takes a dataset away; its data goes when nobody else holds futures of it. Raises KeyError when there is none.

        >>> client.unpublish_dataset("numbers")
        """

        def then(request: Request, found: Any) -> None:
            if not found:
                raise KeyError(f"there is no dataset {name!r}: see list_datasets()")

        wire = to_wire_name(name)
        return self._ask_for_dataset(lambda number: DeleteValue(number, _KIND, wire), then)

    @property
    def datasets(self) -> Datasets:
        """The datasets as a mapping.

        >>> client.datasets["numbers"] = client.scatter([1, 2, 3], hash=False)
        >>> "numbers" in client.datasets
        True
        """
        return Datasets(cast("Client", self))


async def _one_by_one(publish: Callable[..., Any], entries: list[Any]) -> None:
    for entry in entries:
        await publish(*entry)


def _sorted(names: list[str]) -> tuple[UserKey, ...]:
    return tuple(sorted(map(to_user, names), key=str))


class Datasets(MutableMapping[Any, Any]):
    """The published datasets of a cluster; setting one replaces it. For synchronous clients; else `get_dataset` and its kin."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def _usable(self) -> Client:
        if self._client._called_asynchronously():
            raise TypeError(
                "client.datasets waits for the scheduler: with an asynchronous client await get_dataset, ..."
            )
        return self._client

    def __getitem__(self, name: Any) -> Any:
        return self._usable().get_dataset(name)

    def __setitem__(self, name: Any, value: Any) -> None:
        self._usable().publish_dataset(value, name=name, override=True)

    def __delitem__(self, name: Any) -> None:
        self._usable().unpublish_dataset(name)

    def __contains__(self, name: object) -> bool:
        return name in self._usable().list_datasets()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._usable().list_datasets())

    def __len__(self) -> int:
        return len(self._usable().list_datasets())

    def __repr__(self) -> str:
        return f"<Datasets of {self._client!r}>"
