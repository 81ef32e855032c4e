"""The methods of both clients, made from the descriptions in `*_calls`: same parameters, types and docstring."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine, Mapping
from functools import wraps
from typing import Any, Generic, ParamSpec, TypeVar, overload

from pydantic.alias_generators import to_snake

from lucid_compute.client.call import ApiCall, PagedCall
from lucid_compute.client.pages import AsyncPages, Pages
from lucid_compute.client.transport import AsyncTransport, Transport

P = ParamSpec("P")
T = TypeVar("T")


class Resource:
    """The methods of the synchronous client for one kind of resource, such as nodes."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport


class AsyncResource:
    """The methods of the asynchronous client for one kind of resource."""

    def __init__(self, transport: AsyncTransport) -> None:
        self.transport = transport


class Endpoint(Generic[P, T]):
    """A method that sends a call and returns its result; a coroutine function on an `AsyncResource`."""

    def __init__(self, describe: Callable[P, ApiCall[T]]) -> None:
        self._describe = describe
        self.__doc__ = describe.__doc__

    @overload
    def __get__(self, resource: Resource, owner: type[Resource] | None = None) -> Callable[P, T]: ...

    @overload
    def __get__(
        self, resource: AsyncResource, owner: type[AsyncResource] | None = None
    ) -> Callable[P, Coroutine[Any, Any, T]]: ...

    def __get__(self, resource: Resource | AsyncResource, owner: type | None = None) -> Callable[P, Any]:
        """Return the bound method."""
        if isinstance(resource, AsyncResource):
            return self._bind_async(resource)

        @wraps(self._describe)
        def method(*args: P.args, **kwargs: P.kwargs) -> T:
            return resource.transport.run(_describe(self._describe, args, kwargs))

        return method

    def _bind_async(self, resource: AsyncResource) -> Callable[P, Coroutine[Any, Any, T]]:
        @wraps(self._describe)
        async def method(*args: P.args, **kwargs: P.kwargs) -> T:
            return await resource.transport.run(_describe(self._describe, args, kwargs))

        return method


class PagedEndpoint(Generic[P, T]):
    """A method that returns a list to iterate over, page by page; asynchronously on an `AsyncResource`."""

    def __init__(self, describe: Callable[P, PagedCall[Any, T]]) -> None:
        self._describe = describe
        self.__doc__ = describe.__doc__

    @overload
    def __get__(self, resource: Resource, owner: type[Resource] | None = None) -> Callable[P, Pages[T]]: ...

    @overload
    def __get__(
        self, resource: AsyncResource, owner: type[AsyncResource] | None = None
    ) -> Callable[P, AsyncPages[T]]: ...

    def __get__(self, resource: Resource | AsyncResource, owner: type | None = None) -> Callable[P, Any]:
        """Return the bound method."""

        @wraps(self._describe)
        def method(*args: P.args, **kwargs: P.kwargs) -> Pages[T] | AsyncPages[T]:
            listing = _describe(self._describe, args, kwargs)
            if isinstance(resource, AsyncResource):
                return AsyncPages(resource.transport, listing)
            return Pages(resource.transport, listing)

        return method


def _describe(describe: Callable[..., T], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> T:
    """Return the description of a call whose arguments may have the wire's names, as in the guides.

    A dict after the positional arguments is the request's fields: `heartbeat({"passportId": …})`.
    """
    known = inspect.signature(describe).parameters
    positional = [name for name, each in known.items() if each.kind is each.POSITIONAL_OR_KEYWORD]
    fields = dict(kwargs)
    if len(args) == len(positional) + 1 and isinstance(args[-1], Mapping):
        *args_, last = args
        if twice := sorted(fields.keys() & last.keys()):
            raise TypeError(f"{twice[0]!r} is given twice.")
        args, fields = tuple(args_), {**last, **fields}
    named: dict[str, Any] = {}
    for name, value in fields.items():
        python = name if name in known else _python_name(name, known)
        if python in named:
            raise TypeError(f"{name!r} is given twice, under both of its names.")
        named[python] = value
    return describe(*args, **named)


def _python_name(name: str, known: Mapping[str, inspect.Parameter]) -> str:
    """Return the parameter for a name of the wire: `passport_id` for `passportId`, `from_` for `from`."""
    return f"{name}_" if f"{name}_" in known else to_snake(name)
