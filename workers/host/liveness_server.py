"""The process beside a worker that reports how the worker's process fares; see `workers.host.liveness`. It runs as a script
without site-packages, and so imports nothing of the project: that takes 10 MB and some 20 ms.

To each connection it writes the states of the process's threads, a letter each as in Linux, and the seconds of processor time
that it has used. It ends when its standard input does.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import sys


def report(pid: int) -> str:
    """What is written about a process: "RSS 12.34", and "Z 0" when there is no such process."""
    states, ticks = "", 0
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208
            try:
                with open(f"/proc/{pid}/task/{thread}/stat") as stat:  # noqa: PTH123
                    fields = stat.read().rpartition(")")[2].split()
            except OSError:  # it has ended meanwhile
                continue
            states += fields[0]
            ticks += int(fields[11]) + int(fields[12])
    except OSError:
        pass
    return f"{states or 'Z'} {ticks / os.sysconf('SC_CLK_TCK'):.2f}"


def main(pid: int, listener: socket.socket) -> None:
    """Answers until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's; the parent decides
    with selectors.DefaultSelector() as ready:
        ready.register(sys.stdin, selectors.EVENT_READ)
        ready.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                if key.fileobj is sys.stdin:
                    return
                try:
                    with listener.accept()[0] as connection:
                        connection.setblocking(False)
                        connection.send(report(pid).encode())
                except OSError:  # one that asks no more
                    pass


if __name__ == "__main__":
    main(int(sys.argv[1]), socket.socket(fileno=int(sys.argv[2])))
