"""Methods of the clients, made of the calls: each has its call's parameters, types and docstring."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, Generic, ParamSpec, TypeVar

from lucid_compute.client.call import Call, Listing
from lucid_compute.client.pages import AsyncPages, Pages
from lucid_compute.client.transport import AsyncTransport, Transport

P = ParamSpec("P")
T = TypeVar("T")


class Noun:
    """What the synchronous client can do with one kind of thing."""

    def __init__(self, transport: Transport) -> None:
        """Send calls through `transport`."""
        self.transport = transport


class AsyncNoun:
    """What the asynchronous client can do with one kind of thing."""

    def __init__(self, transport: AsyncTransport) -> None:
        """Send calls through `transport`."""
        self.transport = transport


class Sent(Generic[P, T]):
    """A method that sends a call and answers its answer."""

    def __init__(self, describe: Callable[P, Call[T]]) -> None:
        """Send what `describe` answers."""
        self._describe = describe
        self.__doc__ = describe.__doc__

    def __get__(self, noun: Noun, _: type[Noun] | None = None) -> Callable[P, T]:
        """Answer the method of one noun."""

        @wraps(self._describe)
        def method(*args: P.args, **kwargs: P.kwargs) -> T:
            return noun.transport.run(self._describe(*args, **kwargs))

        return method


class AsyncSent(Generic[P, T]):
    """A method that sends a call; its answer is awaited."""

    def __init__(self, describe: Callable[P, Call[T]]) -> None:
        """Send what `describe` answers."""
        self._describe = describe
        self.__doc__ = describe.__doc__

    def __get__(self, noun: AsyncNoun, _: type[AsyncNoun] | None = None) -> Callable[P, Coroutine[Any, Any, T]]:
        """Answer the method of one noun."""

        @wraps(self._describe)
        async def method(*args: P.args, **kwargs: P.kwargs) -> T:
            return await noun.transport.run(self._describe(*args, **kwargs))

        return method


class Listed(Generic[P, T]):
    """A method that answers a list, to be iterated over."""

    def __init__(self, describe: Callable[P, Listing[Any, T]]) -> None:
        """List what `describe` answers."""
        self._describe = describe
        self.__doc__ = describe.__doc__

    def __get__(self, noun: Noun, _: type[Noun] | None = None) -> Callable[P, Pages[T]]:
        """Answer the method of one noun."""

        @wraps(self._describe)
        def method(*args: P.args, **kwargs: P.kwargs) -> Pages[T]:
            return Pages(noun.transport, self._describe(*args, **kwargs))

        return method


class AsyncListed(Generic[P, T]):
    """A method that answers a list, to be iterated over asynchronously."""

    def __init__(self, describe: Callable[P, Listing[Any, T]]) -> None:
        """List what `describe` answers."""
        self._describe = describe
        self.__doc__ = describe.__doc__

    def __get__(self, noun: AsyncNoun, _: type[AsyncNoun] | None = None) -> Callable[P, AsyncPages[T]]:
        """Answer the method of one noun."""

        @wraps(self._describe)
        def method(*args: P.args, **kwargs: P.kwargs) -> AsyncPages[T]:
            return AsyncPages(noun.transport, self._describe(*args, **kwargs))

        return method
