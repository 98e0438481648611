"""A service that runs in the background: started, found and stopped again by the address of its gateway."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import IO

from cluster.config.schema import Config

#: Seconds that a service has to drain and end.
STOP_SECONDS = 120.0


#: Seconds that a service has until its gateway listens.
LISTEN_SECONDS = 150.0
#: Prefixes of the messages by which a service reports its progress.
LISTENING, SERVING = "gateway at", "serving"


class DaemonError(RuntimeError):
    """A background service that does not start, is not there, or does not stop."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is noted of a service, for others of its user: its key of the scope `admin`, the Ray cluster on which it runs (empty
    if that ends with the process that has started it), and the name that the service has there."""

    admin_key: str = dataclasses.field(repr=False)
    cluster: str = ""
    name: str = ""


def state_directory() -> pathlib.Path:
    """Where running services are noted: $XDG_STATE_HOME/grokmesh, only for its owner's eyes. Raises DaemonError."""
    try:
        base = os.environ.get("XDG_STATE_HOME") or pathlib.Path.home() / ".local" / "state"
        directory = pathlib.Path(base) / "grokmesh"
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (RuntimeError, OSError) as error:  # no home, or one that can't be written to
        raise DaemonError(
            f"running services can't be noted: {error}; set XDG_STATE_HOME to a folder of yours"
        ) from error
    return directory


def _note(address: str) -> pathlib.Path:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise DaemonError(f"{address} is no host:port")
    try:  # one name for all spellings of an address
        host = str(socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        host = host.replace("/", "_")
    return state_directory() / f"serve-{host}-{port}.json"


@contextlib.contextmanager
def noted(address: str, entry: Entry) -> Iterator[None]:
    """Notes this process as the one that has started the service at `address`, while the block runs. The note is locked as
    long as it is true, however this process ends. Raises DaemonError if another process holds it."""
    with _opened(address) as note:
        if not _lock(note):
            raise DaemonError(f"a service runs at {address} already; grokmesh stop ends it")
        _sign(note, entry)
        yield
        note.truncate(0)


def sign(address: str, entry: Entry) -> None:
    """Notes something else of this process, while it is noted at `address`."""
    with _opened(address) as note:
        _sign(note, entry)


def inherit(address: str, entry: Entry) -> None:
    """Waits until the process that is noted as the service at `address` has ended, then notes this one until it ends."""
    note = _opened(address)
    fcntl.flock(note, fcntl.LOCK_EX)
    _sign(note, entry)
    _INHERITED.append(note)


#: Notes that stay open, and so locked, as long as this process lives.
_INHERITED: list[IO[str]] = []


def leave_budgets(address: str, budgets: Mapping[str, tuple[int, float]]) -> None:
    """Keeps what keys have left of their budgets for the service that is noted at `address` after this one."""
    with contextlib.suppress(OSError):
        _budgets(address).write_text(json.dumps({"at": time.time(), "budgets": budgets}), encoding="utf-8")


def left_budgets(address: str) -> tuple[dict[str, tuple[int, float]], float]:
    """The budgets that the last service at `address` left, and how many seconds ago; none if it left none."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        left = json.loads(_budgets(address).read_text(encoding="utf-8"))
        budgets = {str(name): (int(rate), float(missing)) for name, (rate, missing) in left["budgets"].items()}
        return budgets, max(time.time() - float(left["at"]), 0.0)
    return {}, 0.0


#: What the process of a service can be asked to do when it ends: to remove the weights caches; to leave the service to a
#: successor.
FORGET_WEIGHTS, LEAVE_SERVICE = ".forget", ".leave"


def ask(address: str, wish: str) -> None:
    """Notes a wish for the service at `address`."""
    _note(address).with_suffix(wish).touch()


def asked(address: str, wish: str) -> bool:
    """Whether that was asked since the last time that this was."""
    try:
        _note(address).with_suffix(wish).unlink()
    except OSError:
        return False
    return True


def _budgets(address: str) -> pathlib.Path:
    return _note(address).with_suffix(".budgets")


def admin_key(address: str) -> str | None:
    """The key of the scope `admin` of a service at `address` that this user runs on this machine, or None."""
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6 if "[" in host else socket.AF_INET) as probe:
        probe.bind((host.strip("[]"), 0))  # only an address of this machine can be bound to
        for listening in (address, f"0.0.0.0:{port}", f"[::]:{port}"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, DaemonError):
                return str(json.loads(_note(listening).read_text())["admin_key"])
    return None


def left(address: str) -> Entry | None:
    """The service at `address` that goes on though the process has ended that this user has started it with; None if there is
    none."""
    if running(address) is not None:
        return None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(_note(address).read_text())
        entry = Entry(str(found["admin_key"]), str(found["cluster"]), str(found["name"]))
        return entry if entry.cluster else None
    return None


def clear(address: str) -> None:
    """Notes that there is no service at `address` any more."""
    with contextlib.suppress(OSError):
        _note(address).unlink()


def _opened(address: str) -> IO[str]:
    return open(os.open(_note(address), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "a+")  # noqa: PTH123


def _sign(note: IO[str], entry: Entry) -> None:
    note.truncate(0)
    note.write(json.dumps({"pid": os.getpid(), **dataclasses.asdict(entry)}))
    note.flush()


def _lock(note: IO[str]) -> bool:
    try:
        fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def start(config: Config, path: pathlib.Path, timeout: float, *, replace: bool = False) -> pathlib.Path:
    """Starts `grokmesh serve` in the background, shows what it says until it serves, and returns its log.

    Args:
      config: of the service.
      path: of its configuration.
      timeout: seconds that it has until it serves; 0 waits for its gateway to listen, not for its replicas, and not for a
        successor.
      replace: take over from the one that runs.

    Raises:
      DaemonError: one is there already (with `replace`: none is there), or it ended or did not serve in time.
    """
    address = config.gateway.address
    if replace:
        replaceable(address)
    elif running(address):
        raise DaemonError(f"a service runs at {address} already; grokmesh stop ends it, serve --replace replaces it")
    log = _note(address).with_suffix(".log")
    process = launch(path, log, detached=True, replace=replace)
    if timeout:
        follow(process, log, timeout)
    elif not replace:  # a successor listens only when it is ready
        follow(process, log, LISTEN_SECONDS, until=LISTENING)
    return log


def launch(path: pathlib.Path, log: pathlib.Path, *, detached: bool, replace: bool = False) -> subprocess.Popen[bytes]:
    """Runs `grokmesh serve` with the configuration `path`, its words in `log`; detached, it outlives a closed terminal. A log
    that is there is kept beside the new one."""
    if log.exists():  # a predecessor goes on writing to its own
        log.replace(log.with_name(f"{log.name}.1"))
    with log.open("ab") as output:
        return subprocess.Popen(
            # Not with the current folder's modules.
            [
                sys.executable,
                "-P",
                "-m",
                "cluster.cli",
                "serve",
                "--config",
                str(path),
                *(["--replace"] if replace else []),
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=detached,
        )


def follow(process: subprocess.Popen[bytes], log: pathlib.Path, timeout: float, until: str = SERVING) -> None:
    """Shows the messages of a starting service's log until one begins with `until`. Raises DaemonError."""
    deadline = time.monotonic() + timeout
    with log.open() as lines:
        while True:
            line = lines.readline()
            if line:
                message = _message(line)
                print(message, flush=True)
                if message.startswith(until):
                    return
            elif process.poll() is not None:
                raise DaemonError(f"the service ended with code {process.returncode}; its log is {log}")
            elif time.monotonic() > deadline:
                process.terminate()
                raise DaemonError(f"the service was not ready after {timeout:.0f} s; its log is {log}")
            else:
                time.sleep(0.05)


def _message(line: str) -> str:
    """What a line of a log says."""
    with contextlib.suppress(ValueError):
        parsed = json.loads(line)
        if isinstance(parsed, dict) and "message" in parsed:
            return "\n".join(str(parsed[key]) for key in ("message", "error") if key in parsed)
    return line.rstrip("\n")


def terminate(pid: int) -> None:
    """Asks a service to drain and end."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


def running(address: str) -> int | None:
    """The process id of the service at `address` that this user runs here, or None."""
    try:
        with _note(address).open("r+") as note:
            return None if _lock(note) else int(json.load(note)["pid"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def replaceable(address: str) -> int:
    """The process id of the service at `address`. Raises DaemonError if there is none to be replaced."""
    pid = running(address)
    if pid is None:
        raise DaemonError(f"no service of yours runs at {address} to be replaced")
    return pid


def stop(address: str, *, forget: bool = False) -> None:
    """Asks the service at `address` to drain (and to `forget` its weights caches), and waits until it has ended. Raises
    DaemonError."""
    pid = running(address)
    if pid is None:
        raise DaemonError(f"no service of yours runs at {address} on this machine")
    if forget:
        ask(address, FORGET_WEIGHTS)
    terminate(pid)
    deadline = time.monotonic() + STOP_SECONDS
    while running(address) == pid:
        if time.monotonic() > deadline:
            raise DaemonError(f"process {pid} does not end; see {_note(address).with_suffix('.log')}")
        time.sleep(0.1)
