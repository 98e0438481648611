"""Work on texts whose cost is the caller's choice: small texts at once, longer prompts in threads, all else in other processes,
a few at a time."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

from cluster.gateway.auth.api_keys import Caller
from cluster.gateway.errors import exhausted
from workers.text.grammar import GrammarError
from workers.text.sandbox import Budget, Sandbox
from workers.text.tokenizer import Tokenizer

#: Bytes of a text that is worked on at once: less than two milliseconds.
INLINE_BYTES = 2048
#: What a grammar may take until it is known that completions can follow it, and any other work.
GRAMMAR_BUDGET = Budget(1.0, mebibytes=192, niceness=15)
TEXT_BUDGET = Budget(15.0, mebibytes=1024, niceness=15)
#: Jobs at a time, in all and of a key, and how many may wait.
JOBS, MOST_WAITING = max(2, (os.cpu_count() or 1) // 4), 64
JOBS_OF_A_KEY = JOBS // 2
#: Prompts that become tokens at a time; of one key half as many.
ENCODERS = 4
#: Grammars that are remembered.
REMEMBERED = 128
#: What is charged to a key: for each second of a processor, as if so many tokens had been computed.
TOKENS_PER_SECOND = 500
#: And for a prompt that is not small, besides what is computed of it, one for so many bytes.
BYTES_PER_TOKEN = 4096


@dataclasses.dataclass(frozen=True)
class Done:
    """What a job came to: its answer, or a problem, and the seconds of a processor that it took."""

    answer: bytes
    problem: str
    seconds: float

    @classmethod
    def parse(cls, answer: bytes) -> Done:
        """From the answer of `text_job`."""
        line, _, body = answer.partition(b"\n")
        head: dict[str, Any] = json.loads(line)
        return cls(body, head.get("problem", ""), head["seconds"])


class Texts:
    """Runs work on texts in processes of their own. For one event loop. `charge` gets the tokens that it costs a key."""

    def __init__(self, tokenizer: Tokenizer, sandbox: Sandbox, charge: Callable[[Caller, int], None]) -> None:
        self.tokenizer = tokenizer
        self._charge = charge
        self._sandbox = sandbox
        self._pool = concurrent.futures.ThreadPoolExecutor(JOBS, "texts")
        self._encoders = concurrent.futures.ThreadPoolExecutor(ENCODERS, "encode")
        self._encodings: dict[str, asyncio.Semaphore] = collections.defaultdict(
            lambda: asyncio.Semaphore(ENCODERS // 2)
        )
        self._places: dict[str, asyncio.Semaphore] = collections.defaultdict(lambda: asyncio.Semaphore(JOBS_OF_A_KEY))
        self._waiting: collections.Counter[str] = collections.Counter()
        self._grammars: collections.OrderedDict[bytes, str] = collections.OrderedDict()

    async def encode(self, text: str, caller: Caller) -> Sequence[int]:
        """The tokens of a text."""
        if len(text) <= INLINE_BYTES:
            return self.tokenizer.encode(text)
        # SentencePiece lets other threads run meanwhile. A prompt is at most as long as fits the context.
        async with self._encodings[caller.name]:
            self._charge(caller, len(text) // BYTES_PER_TOKEN)
            return await asyncio.get_running_loop().run_in_executor(self._encoders, self.tokenizer.encode, text)

    async def grammar(
        self, kind: str | None, source: object, allowed: Sequence[int], barred: Sequence[str], caller: Caller
    ) -> str:
        """The grammar of a format, or of any text if `kind` is None, without the texts `barred`.

        Raises:
          GrammarError: no completion of the tokens `allowed` can follow it, or that takes too much to find out.
          GatewayError: RESOURCE_EXHAUSTED.
        """
        fields = {"kind": kind, "source": source, "allowed": list(allowed), "barred": list(barred)}
        asked = json.dumps(fields).encode()
        key = hashlib.sha256(asked).digest()
        if (known := self._grammars.get(key)) is not None:
            self._grammars.move_to_end(key)
            return known
        done = await self.run("grammar", asked, caller, GRAMMAR_BUDGET)
        if done.problem:
            raise GrammarError(done.problem)
        grammar = self._grammars[key] = done.answer.decode()
        if len(self._grammars) > REMEMBERED:
            self._grammars.popitem(last=False)
        return grammar

    async def run(self, job: str, data: bytes, caller: Caller, budget: Budget = TEXT_BUDGET) -> Done:
        """A job's outcome; see `text_job`. Raises GatewayError (RESOURCE_EXHAUSTED) if too many wait."""
        own = self._waiting[caller.name]
        if own >= MOST_WAITING - self._waiting.total():  # one key leaves half of the places to others
            raise exhausted(f"{own} texts and formats of this key are waiting to be worked on already", 1.0)
        places, loop = self._places[caller.name], asyncio.get_running_loop()
        self._waiting[caller.name] += 1
        try:
            await places.acquire()
        finally:
            self._waiting[caller.name] -= 1
        working = self._pool.submit(self._run, job, data, budget)
        # A job whose caller has left goes on, keeps its place, and is paid for.
        working.add_done_callback(lambda done: loop.call_soon_threadsafe(self._ended, done, caller, places))
        return await asyncio.wrap_future(working)

    def _ended(self, job: concurrent.futures.Future[Done], caller: Caller, places: asyncio.Semaphore) -> None:
        places.release()
        if not job.cancelled() and job.exception() is None:
            self._charge(caller, round(job.result().seconds * TOKENS_PER_SECOND))

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._encoders.shutdown(wait=False, cancel_futures=True)
        self._sandbox.close()

    def _run(self, job: str, data: bytes, budget: Budget) -> Done:
        with self._sandbox.job(budget) as stream:
            try:
                stream.send_bytes(job.encode())
                stream.send_bytes(data)
                answer = stream.recv_bytes()
            except (EOFError, OSError):
                return Done(b"", f"is too costly: it takes more than {budget}", budget.seconds)
        return Done.parse(answer)
