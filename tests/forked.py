"""Processes that are forked from one that has imported Cenote, and has run nothing yet.

Importing takes several seconds of the processor, of which a process of a test is the same afterwards: it has its own
interpreter, arguments, environment, signals, threads and end. Where a test is about importing, or about a variable that
is read by it, it takes `subprocess`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from typing import IO, TYPE_CHECKING

from tests import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

IMPORTED = (
    "cenote.cli.host",
    "cenote.cli.serve",
    "cenote.models.load",
    "cenote.pipeline.pipeline",
    "cenote.server.app",
    "transformers.models.bert.modeling_bert",
    "transformers.models.bert.tokenization_bert",
    "uvicorn.protocols.http.httptools_impl",
)
READ_BY_IMPORTING = ("HF_", "HUGGINGFACE_", "LD_", "MKL_", "OMP_", "OPENBLAS_", "TORCH", "TRANSFORMERS_")
"""Beginnings of the variables that take effect before a process is forked."""
LONGEST_REQUEST = 1 << 20
ADDRESS = f"\0cenote-tests-{os.environ.get('PYTEST_XDIST_TESTRUNUID') or os.getpid()}"
"""Of the process to fork from: no file, and the same for all processes of a test run."""
PATH = (*filter(None, sys.path),)
"""Where modules are found when the tests are collected: what a test adds for itself is not imported for all others."""


def run(
    program: str, *arguments: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python -c program arguments` to its end, as `subprocess.run` does with what it writes."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out:
        process = Forked("-c", program, *arguments, environment=environment, stdout=out.fileno())
        with process.stderr as log:
            errors = log.read()
        status = process.wait(PATIENCE)
        out.seek(0)
        return subprocess.CompletedProcess([program, *arguments], status, out.read(), errors)


class Forked:
    """`python -m module arguments`, with as much of `subprocess.Popen` as tests use.

    Args:
        module: run as `__main__`; `-c` if the first of the arguments is a program.
        arguments: of the command line.
        environment: variables, by default those of this process.
        stdout: descriptor of the file that it prints to.

    Attributes:
        pid: of the process.
        stderr: text that it writes there.
        returncode: exit status, negative for a signal; `None` while it runs.
    """

    def __init__(
        self, module: str, *arguments: str, environment: Mapping[str, str] | None = None, stdout: int = 1
    ) -> None:
        wanted = dict(os.environ if environment is None else environment)
        changed = dict(wanted.items() ^ os.environ.items())
        early = [name for name in changed if name.startswith(READ_BY_IMPORTING)]
        assert not early, f"{early} are read before a process is forked; use subprocess"
        request = {
            "module": module,
            "arguments": arguments,
            "environment": wanted,
            "path": sys.path,
            "folder": os.getcwd(),
        }
        reader, writer = os.pipe()
        self._answers, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.stderr: IO[str] = os.fdopen(reader, encoding="utf-8")
        with theirs:
            socket.send_fds(_origin(), [json.dumps(request).encode()], [stdout, writer, theirs.fileno()])
        os.close(writer)
        self.pid = int(self._answers.recv(64))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, or `None` if it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end, and return the exit status.

        Raises:
            subprocess.TimeoutExpired: it runs longer than `timeout` seconds.
        """
        if self.returncode is None:
            self._answers.settimeout(timeout)
            try:
                self.returncode = int(self._answers.recv(64))
            except (BlockingIOError, TimeoutError):
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0) from None
            self._answers.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)


@functools.cache
def _origin() -> socket.socket:
    """Return the end of a socket at whose other end a process waits that has imported Cenote.

    All processes of a test run have the same one: the first that asks starts it, and it ends after the last of them.
    """
    ours = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LONGEST_REQUEST)
    deadline = time.monotonic() + PATIENCE
    while ours.connect_ex(ADDRESS):
        assert time.monotonic() < deadline, "the process to fork from cannot be reached"
        _start()
    atexit.register(ours.close)
    return ours


def _start() -> None:
    """Start the process to fork from, unless another one is starting it, or ends it, right now."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        try:
            listener.bind(ADDRESS)
        except OSError:
            time.sleep(0.01)
            return
        listener.listen()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(PATH)}
        process = subprocess.Popen([sys.executable, "-m", __name__], stdin=listener, env=environment)
        atexit.register(process.wait)


def _requests(opened: list[socket.socket]) -> Iterator[tuple[bytes, list[int]]]:
    """Yield requests, and the descriptors that come with them, until nobody is left to send any.

    Args:
        opened: the listening socket; those of senders join it.
    """
    (listener,) = opened
    while opened == [listener]:
        opened += _accepted(listener)
    while opened:
        for source in select.select(opened, [], [])[0]:
            if source is listener:
                opened += _accepted(listener)
                continue
            content, received, *_ = socket.recv_fds(source, LONGEST_REQUEST, 3)
            if content:
                yield content, received
            else:
                source.close()
                opened.remove(source)
        if opened == [listener]:
            opened[:] = _last(listener)


def _last(listener: socket.socket) -> list[socket.socket]:
    """Let nobody connect any more; return the sender that had just done so, if there is one."""
    listener.shutdown(socket.SHUT_RDWR)
    listener.setblocking(False)
    with listener, contextlib.suppress(OSError):
        return _accepted(listener)
    return []


def _accepted(listener: socket.socket) -> list[socket.socket]:
    """Return the sender that connects, unless it is another user's: an address that is no file has no permissions."""
    sender, _ = listener.accept()
    _, user, _ = struct.unpack("3i", sender.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    if user == os.getuid():
        return [sender]
    sender.close()
    return []


def _fork(listener: socket.socket) -> tuple[str, list[str]]:
    """Fork for each request; return in the processes that run its module, with the arguments of that."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    opened = [listener]
    for request in _requests(opened):
        if os.fork() == 0:
            break
        for descriptor in request[1]:
            os.close(descriptor)
    else:
        os._exit(0)
    for source in opened:
        source.close()
    content, received = request
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    out, errors, answers = received
    child = os.fork()
    if child:
        os.close(errors)
        os.write(answers, str(child).encode())
        _, status = os.waitpid(child, 0)
        with contextlib.suppress(BrokenPipeError):
            os.write(answers, str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, own in enumerate((nothing, out, errors)):
        os.dup2(own, number)
    for own in (nothing, *received):
        os.close(own)
    fields = json.loads(content)
    os.chdir(fields["folder"])
    os.environ.clear()
    os.environ.update(fields["environment"])
    sys.path[:] = fields["path"]
    return fields["module"], fields["arguments"]


if __name__ == "__main__":
    gc.disable()
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()
    gc.enable()
    module, arguments = _fork(socket.socket(fileno=os.dup(0)))
    if module == "-c":
        sys.argv = [module, *arguments[1:]]
        exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
