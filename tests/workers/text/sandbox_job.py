"""Children of a sandbox that do what they are told."""

from __future__ import annotations

import os
import signal
import sys

from workers.text.sandbox import JobStream, run_template


def work(stream: JobStream) -> None:
    """Answers, or does something that it should not."""
    while True:
        job = stream.receive()
        if job == b"compute":
            while True:
                pass
        if job == b"grow":
            kept = []
            while True:
                kept.append(bytearray(1 << 20))
        if job == b"die":
            os.kill(os.getpid(), signal.SIGSEGV)
        told = {b"pid": os.getpid(), b"parent": os.getppid()}
        stream.send(str(told[job]).encode() if job in told else job)


if __name__ == "__main__":
    run_template(int(sys.argv[1]), work)
