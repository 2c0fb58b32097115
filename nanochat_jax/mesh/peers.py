"""How hosts notice each other's death: a thread, and one TCP connection from every process to process 0.

A process that is killed closes its connections with it, and a host that loses power or its network no longer answers
the kernel's probes: either breaks the connection, and then all end within seconds and name it. Nothing is asked of
Python on the other side, so a long compilation is not taken for death. On the same connections processes wait for
each other for hours without a device that spins, and pass small values.

Messages are lines of JSON: {"hello"} and {"welcome"} or {"refused"} at first; then {"at", "value"} from a process that
has reached a barrier and {"all"} to all processes when the last one has; {"end"} says why all must end now.
"""

import contextlib
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable

from nanochat_jax.errors import START_AGAIN, UserError
from nanochat_jax.mesh.cluster import ADDRESS, Cluster

LEAVING = "the end"  # the barrier after which a broken connection is no process's death
GONE = "is gone; the run stops here and resumes from its last checkpoint when started again"
# a silent host is taken for gone after 10 + 3 x 5 seconds, and after 25 where something was sent to it
_PROBES = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 25_000, "TCP_NODELAY": 1}


class _Link:
    """One connection, by lines of JSON."""

    def __init__(self, link: socket.socket):
        self.socket, self._file = link, link.makefile("rb")
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _PROBES.items():
            if hasattr(socket, name):
                link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, **message) -> None:
        """A broken connection is the reader's to notice."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict | None:
        """The next message; None when the connection has ended or the socket's timeout has passed. A host that no
        longer answers the probes is a TimeoutError as well (ETIMEDOUT), so the two are not told apart."""
        try:
            line = self._file.readline()
            message = json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # wakes its reader
        self.socket.close()


class Watch:
    """This process's end of it. UserError where not all have connected within `timeout` seconds.

    When a connection breaks, a thread ends the process (`os._exit`), for the main thread may hang in a collective;
    `log` then gets the last line, beside stderr.
    """

    def __init__(self, cluster: Cluster, timeout: float):
        self.me, self.count = cluster.process, cluster.processes
        self.names = {self.me: socket.gethostname()}  # process -> host
        self.log: Callable[[str], None] | None = None
        self._links: dict[int, _Link] = {}  # process 0: to all others; they: to process 0
        self.leaving = False
        self._ending = threading.Lock()
        self._lock = threading.Lock()
        self._arrived: dict[int, tuple] = {}  # process 0: who has reached the barrier -> (its name, value)
        self._answers: queue.SimpleQueue = queue.SimpleQueue()
        try:
            (self._connect if self.me else self._listen)(cluster, time.monotonic() + timeout, timeout)
        except BaseException:
            self.close()
            raise
        # a worker that is forked later would hold the connections open after our death
        os.register_at_fork(after_in_child=self._close_after_fork)
        self._readers = [threading.Thread(target=self._read, args=(p,), daemon=True) for p in self._links]
        for thread in self._readers:
            thread.start()

    def who(self, process: int) -> str:
        return f"host {self.names.get(process, '?')} (process {process})"

    def _listen(self, cluster: Cluster, deadline: float, timeout: float) -> None:
        """Process 0: accepts the others."""
        port, dual = cluster.port + 1, socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        try:
            server = socket.create_server(("", port), family=family, backlog=128, dualstack_ipv6=dual)
        except OSError as e:
            raise UserError(
                f"port {port} of {self.names[0]} cannot be used ({e.strerror}); set another {ADDRESS} for all processes"
            ) from None
        with server:
            while len(self._links) < self.count - 1:
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    link = _Link(server.accept()[0])
                except TimeoutError:
                    text = ", ".join(str(p) for p in range(1, self.count) if p not in self._links)
                    text = f"after {timeout:.0f} s process {text} of {self.count} had not come to {cluster.coordinator}"
                    for other in self._links.values():
                        other.send(refused=text)
                    raise UserError(f"{text}; see what became of them, and start all again") from None
                self._accept(link)
        for link in self._links.values():
            link.send(welcome=[self.names[p] for p in range(self.count)])

    def _accept(self, link: _Link) -> None:
        link.socket.settimeout(5)  # what sends nothing is no process of this run
        hello = (link.receive() or {}).get("hello")
        link.socket.settimeout(None)
        if not isinstance(hello, list) or len(hello) != 3:
            return link.close()
        process, host, count = hello
        if count != self.count or process not in range(1, self.count) or process in self._links:
            taken = f"; process {process} is {self.names[process]} already" if process in self._links else ""
            link.send(refused=f"process {process} of {count} came to where {self.count} meet{taken}")
            return link.close()
        self._links[process], self.names[process] = link, host

    def _connect(self, cluster: Cluster, deadline: float, timeout: float) -> None:
        """The other processes: connect to process 0, as soon as it is there."""
        address = (cluster.host, cluster.port + 1)
        while not self._links:
            try:
                left = deadline - time.monotonic()
                self._links[0] = _Link(socket.create_connection(address, max(0.1, min(left, 5))))
            except OSError as e:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"process 0 was not to be reached at {address[0]}:{address[1]} for {timeout:.0f} s ({e}); is "
                        f"it running, and is {ADDRESS}={cluster.coordinator} its host?"
                    ) from None
                time.sleep(0.3)
        link = self._links[0]
        link.send(hello=[self.me, self.names[self.me], self.count])
        link.socket.settimeout(max(deadline - time.monotonic(), 0) + 10)  # process 0 gives up first, and says why
        answer = link.receive() or {}
        if "welcome" not in answer:
            raise UserError(answer.get("refused") or f"process 0 at {cluster.coordinator} left before all had come")
        link.socket.settimeout(None)
        self.names = dict(enumerate(answer["welcome"]))

    def _read(self, process: int) -> None:
        try:
            while (message := self._links[process].receive()) is not None:
                if "all" in message:
                    self.leaving |= message["leaving"]
                    self._answers.put(message["all"])
                elif "at" in message:
                    self._arrive(process, message["at"], message["value"])
                elif "end" in message and not self.leaving:
                    self.end(message["end"], message["code"])
        finally:  # whatever ends this thread: nobody runs unwatched
            if not self.leaving:
                self.end(f"{self.who(process)} {GONE}", START_AGAIN)

    def end(self, text: str, code: int) -> None:
        """Tells the others, says `text` last of all and ends this process with `code`; never returns."""
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # another thread ends the process
        with contextlib.suppress(Exception):  # whatever goes wrong here, this process must end
            self.tell(text, code)
        words = threading.Thread(target=self._last_words, args=(text,), daemon=True)
        words.start()
        words.join(5)  # a full disk or a lock of the main thread's must not keep us alive
        os.write(2, f"{chr(10) if os.isatty(2) else ''}{text}\n".encode())
        os._exit(code)

    def tell(self, text: str, code: int) -> None:
        """Ends the others, and waits a little for it: the message must be there before the connection breaks."""
        self.leaving = True
        for link in self._links.values():
            link.send(end=text, code=code)
        until = time.monotonic() + 3
        for thread in self._readers:
            if thread is not threading.current_thread():
                thread.join(max(0, until - time.monotonic()))

    def _last_words(self, text: str) -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if self.log:
            self.log(text)

    def meet(self, name: str, value, timeout: float | None = None) -> list:
        """The values of all processes, when all have reached barrier `name`. queue.Empty after `timeout` seconds."""
        if self.me:
            self._links[0].send(at=name, value=value)
        else:
            self._arrive(0, name, value)
        return self._answers.get(timeout=timeout)

    def _arrive(self, process: int, name: str, value) -> None:
        """Process 0: one more has reached the barrier."""
        with self._lock:
            self._arrived[process] = (name, value)
            arrived = dict(self._arrived)
            if len(arrived) == self.count:
                self._arrived = {}
        if any(other != name for other, _ in arrived.values()):
            self._mismatch(arrived)
        if len(arrived) == self.count:
            values, leaving = [arrived[p][1] for p in range(self.count)], name == LEAVING
            self.leaving |= leaving
            for link in self._links.values():
                link.send(all=values, leaving=leaving)
            self._answers.put(values)

    def _mismatch(self, arrived: dict[int, tuple]) -> None:
        """Two are at different barriers: one has left, or the program does not do the same everywhere."""
        for process, (name, value) in arrived.items():
            if name == LEAVING:
                text, code = value
                self.end(f"{self.who(process)} {text}", code)
        places = " and ".join(f"{self.who(p)} waits at {name!r}" for p, (name, _) in sorted(arrived.items()))
        self.end(f"{places}: they do not run the same program, or not with the same settings", 1)

    def _close_after_fork(self) -> None:
        for link in self._links.values():
            with contextlib.suppress(OSError):
                os.close(link.socket.detach())

    def close(self) -> None:
        self.leaving = True
        for link in self._links.values():
            link.close()
