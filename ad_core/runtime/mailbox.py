"""Where a request's outputs wait for their reader. One output at most: a slow reader gets several steps' deltas at once."""

from __future__ import annotations

import asyncio
import threading

from ad_core.runtime.outputs import RequestOutput


class Mailbox:
    """For a reader in another thread."""

    def __init__(self) -> None:
        self._arrived = threading.Condition()
        self._unread: RequestOutput | None = None

    def put(self, output: RequestOutput) -> None:
        with self._arrived:
            self._unread = output.after(self._unread)
            self._arrived.notify()

    def get(self) -> RequestOutput:
        """Waits for the next output."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._unread is not None)
            output, self._unread = self._unread, None
        assert output is not None
        return output


class AsyncMailbox:
    """For a reader in the running event loop. `put` may be called from any thread; it raises once that loop is closed."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._unread: RequestOutput | None = None

    def put(self, output: RequestOutput) -> None:
        self._loop.call_soon_threadsafe(self._put_here, output)

    def _put_here(self, output: RequestOutput) -> None:
        self._unread = output.after(self._unread)
        self._arrived.set()

    async def get(self) -> RequestOutput:
        """Waits for the next output."""
        await self._arrived.wait()
        self._arrived.clear()
        output, self._unread = self._unread, None
        assert output is not None
        return output
