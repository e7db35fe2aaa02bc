"""Server-sent events: bytes in, as they come; payloads of whole events out.

The wire format is https://html.spec.whatwg.org/multipage/server-sent-events.html: lines end in LF, CRLF or CR, an
empty line ends an event, lines that start with a colon are comments, several ``data`` lines are joined.
"""

from __future__ import annotations

_PLAIN_START, _PLAIN_END = b"data: ", b"\n\n"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class EventStream:
    """One stream. The bytes may be cut anywhere, inside a code point or between CR and LF too.

    Invariant: `feed` over any cuts of a stream gives, in all, the payloads of the whole stream.
    """

    __slots__ = ("_after_cr", "_data", "_rest", "_start")

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._after_cr = False
        self._start = True

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads (UTF-8) of the events that `data` completes; events without a data line have none."""
        if self._may_be_plain(data):
            payloads = data[len(_PLAIN_START) : -len(_PLAIN_END)].split(_PLAIN_END + _PLAIN_START)
            if data.count(b"\n") == len(_PLAIN_END) * len(payloads):
                self._start = False
                return payloads
        if self._start and not self._has_started(data):
            return []
        return self._lines(data)

    def _may_be_plain(self, data: bytes) -> bool:
        """What nearly every read is: whole events of one line each, and nothing left over from before.

        Such a read has no other line ends than those that part its events.
        """
        return (
            not (self._rest or self._data or self._after_cr)
            and data.startswith(_PLAIN_START)
            and data.endswith(_PLAIN_END)
            and b"\r" not in data
        )

    def _has_started(self, data: bytes) -> bool:
        """Drop a byte order mark; False until it is known whether there is one."""
        head = self._rest + data
        if len(head) < len(_BYTE_ORDER_MARK) and _BYTE_ORDER_MARK.startswith(head):
            self._rest = head
            return False
        return True

    def _lines(self, data: bytes) -> list[bytes]:
        if self._after_cr and data:
            data, self._after_cr = data.removeprefix(b"\n"), False
        data = self._rest + data
        if self._start:
            data, self._start = data.removeprefix(_BYTE_ORDER_MARK), False
        if data.endswith(b"\r"):
            self._after_cr = True
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, self._rest = data.split(b"\n")
        return [payload for line in lines if (payload := self._line(line)) is not None]

    def _line(self, line: bytes) -> bytes | None:
        """The payload of the event that this line ends, if it ends one."""
        if not line:
            data, self._data = self._data, []
            return b"\n".join(data) if data else None
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
        return None
