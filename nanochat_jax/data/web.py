"""Files at plain web addresses, as `hub.fetch` wants them: their size, and their bytes from any place on."""

from __future__ import annotations

import urllib.error
import urllib.request

TIMEOUT = 30  # seconds without a byte
ABSENT = (403, 404, 410)  # S3 answers 403 for what is not there


def _ask(url: str, method: str = "GET", headers: dict | None = None):
    request = urllib.request.Request(url, method=method, headers=headers or {})
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as e:
        if e.code in ABSENT:
            raise FileNotFoundError(url) from None
        raise


class Web:
    """The part of a file system that `hub.fetch` uses; paths are addresses."""

    def info(self, url: str) -> dict:
        """{"size": bytes}. OSError where the server does not say."""
        with _ask(url, "HEAD") as answer:
            length = answer.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise OSError("the server does not say how large it is")
        return {"size": int(length)}

    def open(self, url: str, mode: str = "rb", size: int | None = None) -> _Remote:
        return _Remote(url, size)


class _Remote:
    """A file read once from a place on; the request is sent when the place is known."""

    def __init__(self, url: str, size: int | None):
        self._url, self._size, self._answer = url, size, None

    def __enter__(self) -> _Remote:
        return self

    def __exit__(self, *exc) -> None:
        if self._answer is not None:
            self._answer.close()

    def seek(self, place: int) -> None:
        if self._size is not None and place >= self._size:
            return  # nothing is left, and a server would refuse to send that
        self._answer = _ask(self._url, headers={"Range": f"bytes={place}-"} if place else None)
        left = place if self._answer.status != 206 else 0  # who does not know ranges sends all
        while left and (skipped := len(self._answer.read(min(left, 1 << 20)))):
            left -= skipped

    def read(self, n: int) -> bytes:
        return self._answer.read(n) if self._answer is not None else b""
