"""Many streams over one connection, with flow control for each. Pure: messages in and out, no clock and no socket.

The service opens a stream for each request. It sends the request's bytes and may reset the stream; the agent sends the
response's bytes and ends the stream. Each side may have `WINDOW_BYTES` of a stream under way that the other side has
not passed on. So a slow reader of one stream holds up no other stream, and a stream's memory is bounded.

The peer is not trusted: whatever breaks a rule is a `FrameFault`, which ends the connection.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from lucid_compute.tunnel.frames import (
    HEAD_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_PAYLOAD_BYTES,
    Frame,
    FrameFault,
    FrameKind,
    read_amount,
    read_frames,
    write_frame,
    write_window,
)

WINDOW_BYTES = 256 * 1024
MAX_STREAMS = 1024
LATE_BYTES = 1024  # of frames that may be under way when a stream ends here, beside its window
MAX_STREAM_ID = 2**32 - 1


class StreamHandler(Protocol):
    """What receives the bytes of one stream."""

    def data_received(self, data: bytes) -> None:
        """Handle bytes; once they are passed on, call the stream's `consume`."""

    def end_received(self) -> None:
        """Handle the end of the stream: all of its bytes have come."""

    def reset_received(self) -> None:
        """Handle the reset of the stream, or the loss of its connection."""

    def window_opened(self) -> None:
        """Handle that bytes which waited were sent: `unsent_bytes` is lower than before."""


class TunnelStream:
    """One stream. `unsent_bytes` wait for the peer's window or for the connection.

    `is_over`: nothing more can be sent or received.
    """

    __slots__ = (
        "_credit",
        "_ends",
        "_is_new",
        "_multiplexer",
        "_owed",
        "_unsent",
        "_window",
        "handler",
        "id",
        "is_over",
        "unsent_bytes",
    )

    def __init__(self, multiplexer: Multiplexer, stream_id: int, *, is_new: bool) -> None:
        self.id = stream_id
        self.handler: StreamHandler | None = None
        self.is_over = False
        self.unsent_bytes = 0
        self._multiplexer = multiplexer
        self._unsent: deque[memoryview] = deque()
        self._window = self._credit = WINDOW_BYTES  # what may be sent, and received
        self._owed = 0  # consumed, and not granted again yet
        self._is_new = is_new  # its OPEN frame is still to be sent
        self._ends = False

    def write(self, data: bytes) -> None:
        """Send bytes as soon as the peer's window and the connection allow it. After the end, drop them."""
        if self.is_over or self._ends or not data:
            return
        self._unsent.append(memoryview(data))
        self.unsent_bytes += len(data)
        self._multiplexer.schedule(self)

    def end(self) -> None:
        """End the stream after what was written."""
        if not self.is_over:
            self._ends = True
            self._multiplexer.schedule(self)

    def reset(self) -> None:
        """End the stream at once. Unsent bytes are dropped."""
        if not self.is_over:
            self._multiplexer.drop(self, tells_peer=not self._is_new)

    def consume(self, count: int) -> None:
        """Let the peer send `count` further bytes. They are granted in large portions."""
        self._owed += count
        if self._owed * 2 >= WINDOW_BYTES and not self.is_over:
            owed, self._owed = self._owed, 0
            self._credit += owed
            self._multiplexer.send_control(write_window(self.id, owed))

    # --- called by the multiplexer

    @property
    def can_send(self) -> bool:
        """Return whether a frame of this stream can be sent now."""
        return bool(self._unsent and self._window > 0) or (not self._unsent and (self._ends or self._is_new))

    @property
    def credit(self) -> int:
        """How many bytes the peer may still send."""
        return self._credit

    def next_frame(self) -> bytes:
        """Return the next frame: its opening, its bytes or its end. Call it only while `can_send`."""
        kind = FrameKind.OPEN if self._is_new else FrameKind.DATA
        self._is_new = False
        if self._unsent:
            first = self._unsent[0]
            size = min(len(first), self._window, MAX_PAYLOAD_BYTES)
            if size == len(first):
                self._unsent.popleft()
            else:
                self._unsent[0] = first[size:]
            self._window -= size
            self.unsent_bytes -= size
            return write_frame(kind, self.id, first[:size])
        if kind is FrameKind.OPEN:
            return write_frame(kind, self.id)
        self._multiplexer.drop(self, tells_peer=False)
        return write_frame(FrameKind.END, self.id)

    def clear(self) -> None:
        """Forget what was not sent: the stream is over."""
        self.is_over = True
        self._unsent.clear()
        self.unsent_bytes = 0

    def receive(self, payload: bytes) -> None:
        """Pass received bytes on.

        Raises:
            FrameFault: there are none, or more than the window allows.
        """
        self._credit -= len(payload)
        if self._credit < 0:
            raise FrameFault(f"Stream {self.id} has more bytes than its window allows.")
        if self.handler is not None:
            self.handler.data_received(payload)

    def widen(self, amount: int) -> None:
        """Let further bytes be sent.

        Raises:
            FrameFault: it is more than was sent.
        """
        self._window += amount
        if self._window > WINDOW_BYTES:
            raise FrameFault(f"The window of stream {self.id} is wider than what was sent.")
        if self._unsent:
            self._multiplexer.schedule(self)


class Multiplexer:
    """The streams of one connection, on one side of it.

    `receive` gets the messages of the peer. `take` returns the next message to send; `on_output` is called when there
    is one again.
    """

    def __init__(
        self,
        on_output: Callable[[], None],
        *,
        on_open: Callable[[TunnelStream], None] | None = None,
        on_control: Callable[[Frame], None] | None = None,
    ) -> None:
        """`on_open` gets the streams that the peer opens; None: it may open none. `on_control` gets HELLO and such."""
        self._on_output = on_output
        self._on_open = on_open
        self._on_control = on_control
        self._streams: dict[int, TunnelStream] = {}
        self._control: deque[bytes] = deque()
        self._ready: dict[TunnelStream, None] = {}
        self._last_id = 0
        self._late_bytes = 0  # which may still come for streams that ended here

    def __len__(self) -> int:
        """Return the number of streams."""
        return len(self._streams)

    def open(self) -> TunnelStream | None:
        """Open a stream, which the peer learns of with its first bytes; None if too many are open already."""
        if len(self._streams) >= MAX_STREAMS or self._last_id >= MAX_STREAM_ID:
            return None
        self._last_id += 1
        stream = self._streams[self._last_id] = TunnelStream(self, self._last_id, is_new=True)
        return stream

    def take(self, *, with_data: bool = True) -> bytes:
        """Return the next message to send, empty if there is none.

        The streams take turns, one frame each. Not `with_data`: only what keeps the peer's own bytes flowing, and ends.
        """
        frames: list[bytes] = []
        size = 0
        while self._control and size < MAX_MESSAGE_BYTES:
            frames.append(self._control.popleft())
            size += len(frames[-1])
        sent: list[TunnelStream] = []
        while with_data and self._ready and size + MAX_PAYLOAD_BYTES + HEAD_BYTES <= MAX_MESSAGE_BYTES:
            stream = next(iter(self._ready))
            del self._ready[stream]
            if not stream.can_send:
                continue
            frames.append(stream.next_frame())
            size += len(frames[-1])
            sent.append(stream)
            if not stream.is_over and stream.can_send:
                self._ready[stream] = None
        for stream in sent:
            if stream.handler is not None and not stream.is_over:
                stream.handler.window_opened()
        return frames[0] if len(frames) == 1 else b"".join(frames)

    def receive(self, message: bytes) -> None:
        """Handle a message of the peer.

        Raises:
            FrameFault: the peer broke a rule. End the connection, and call `close`.
        """
        for frame in read_frames(message):
            kind, stream_id, payload = frame
            if not stream_id:
                self._receive_control(frame)
            elif (stream := self._streams.get(stream_id)) is not None:
                self._receive_on(stream, kind, payload)
            elif kind is FrameKind.OPEN:
                self._accept(stream_id, payload)
            elif stream_id > self._last_id:
                raise FrameFault(f"Stream {stream_id} was never opened.")
            else:
                self._late_bytes -= HEAD_BYTES + len(payload)
                if self._late_bytes < 0:
                    raise FrameFault(f"Stream {stream_id} goes on after its end.")

    def close(self) -> None:
        """End every stream, because the connection is lost."""
        streams = list(self._streams.values())
        self._streams.clear()
        self._ready.clear()
        self._control.clear()
        for stream in streams:
            stream.clear()
            if stream.handler is not None:
                stream.handler.reset_received()

    # --- called by streams

    def schedule(self, stream: TunnelStream) -> None:
        """Send what the stream has, in its turn."""
        if stream.can_send and stream not in self._ready:
            self._ready[stream] = None
            self._on_output()

    def send_control(self, frame: bytes) -> None:
        """Send a frame before all that waits."""
        self._control.append(frame)
        self._on_output()

    def drop(self, stream: TunnelStream, *, tells_peer: bool) -> None:
        """Forget a stream that ends on this side."""
        self._forget(stream)
        self._late_bytes += stream.credit + LATE_BYTES
        if tells_peer:
            self.send_control(write_frame(FrameKind.RESET, stream.id))

    # --- inside

    def _forget(self, stream: TunnelStream) -> None:
        stream.clear()
        self._ready.pop(stream, None)
        self._streams.pop(stream.id, None)

    def _receive_control(self, frame: Frame) -> None:
        if frame.kind <= FrameKind.WINDOW or self._on_control is None:
            raise FrameFault(f"A frame of kind {frame.kind.name} names no stream.")
        self._on_control(frame)

    def _receive_on(self, stream: TunnelStream, kind: FrameKind, payload: bytes) -> None:
        if kind is FrameKind.DATA:
            if not payload:
                raise FrameFault("A data frame has no data.")
            stream.receive(payload)
        elif kind is FrameKind.WINDOW:
            stream.widen(read_amount(payload))
        elif kind is FrameKind.RESET or (kind is FrameKind.END and self._on_open is None):
            self._forget(stream)
            if stream.handler is not None and kind is FrameKind.END:
                stream.handler.end_received()
            elif stream.handler is not None:
                stream.handler.reset_received()
        else:
            raise FrameFault(f"A frame of kind {kind.name} is not for stream {stream.id}.")

    def _accept(self, stream_id: int, payload: bytes) -> None:
        """Accept a stream that the peer opens; refuse it while too many are open."""
        if self._on_open is None or stream_id <= self._last_id:
            raise FrameFault(f"Stream {stream_id} may not be opened.")
        self._last_id = stream_id
        stream = TunnelStream(self, stream_id, is_new=False)
        if len(self._streams) >= MAX_STREAMS:
            self.drop(stream, tells_peer=True)
            return
        self._streams[stream_id] = stream
        self._on_open(stream)
        if payload and not stream.is_over:
            stream.receive(payload)
