"""`grokmesh generate -i`: a terminal that goes on, whatever becomes of a completion."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading

from tests.support.fake_service import serving


def test_an_empty_line_goes_on_and_an_interrupt_ends_only_the_completion() -> None:
    with serving(0.05) as (address, _):
        # Whoever runs the tests in the background may have interrupts ignored.
        command = ["env", "--default-signal=INT", sys.executable, "-m", "cluster.cli", "generate", "-i"]
        command += ["--address", address, "--max-tokens", "40"]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(60, process.kill)
        timer.start()

        def read_until(end: bytes) -> str:
            text = b""
            while not text.endswith(end):
                byte = process.stdout.read(1)  # type: ignore[union-attr]
                assert byte, text
                text += byte
            return text.decode()

        try:
            read_until(b"> ")
            process.stdin.write(b"one two\n")
            first = read_until(b"> ")
            process.stdin.write(b"\n")
            second = read_until(b"> ")
            counts = [int(found) for text in (first, second) for found in re.findall(r"(\d+) prompt tokens", text)]
            assert counts[1] >= counts[0] + 40
            process.stdin.write(b"three\n")
            process.stdout.read(1)
            process.send_signal(signal.SIGINT)
            assert "[cancelled]" in read_until(b"> ")
            process.stdin.write(b"four\n")
            assert "prompt tokens" in read_until(b"> ")
            process.stdin.close()
            assert process.wait(timeout=30) == 0
        finally:
            timer.cancel()
            process.kill()
            process.stdin.close()
            process.stdout.close()
            process.wait()
