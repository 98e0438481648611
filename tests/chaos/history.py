"""Clients under faults, and what they saw: each stream must be, token for token, what its request gets undisturbed."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from typing import Any

import grpc

from grokmesh import Client, Token

PROMPTS = ("In the beginning", "And the lion said", "The", "Once upon a time there was a fox who", "A wolf ")


@dataclasses.dataclass(frozen=True)
class Case:
    """A request, and what it gets when nothing goes wrong."""

    prompt: str | list[int]
    options: dict[str, Any]
    text: str
    tokens: tuple[Token, ...]
    finish_reason: str | None


@dataclasses.dataclass
class History:
    """What clients saw.

    Attributes:
      completed: streams that were as they should be.
      wrong: what was different, of streams that weren't.
      failed: errors that reached a client.
      longest_pause: seconds between two parts of a stream, at most.
    """

    completed: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)
    failed: list[str] = dataclasses.field(default_factory=list)
    longest_pause: float = 0.0

    def check(self, least: int) -> None:
        """Tells what clients saw; it must be right, without an error, and more than `least` streams."""
        print(f"{self.completed} streams, {len(self.failed)} errors, longest pause {self.longest_pause:.1f} s")
        assert not self.wrong, self.wrong
        assert not self.failed, self.failed
        assert self.completed > least


def make_cases(client: Client, count: int, seed: int) -> list[Case]:
    """Requests of all kinds, answered once while nothing goes wrong."""
    rng = random.Random(seed)
    cases = []
    for _ in range(count):
        options: dict[str, Any] = {
            "max_tokens": rng.choice([1, 20, 120, 380]),
            "temperature": rng.choice([0.0, 0.8, 1.0]),
            "seed": rng.getrandbits(63),
            "ignore_eos": rng.random() < 0.5,
            "top_logprobs": rng.choice([0, 3]),
            "repetition_penalty": rng.choice([1.0, 1.0, 1.2]),
        }
        if rng.random() < 0.2:
            options["logit_bias"] = {rng.randrange(300, 2000): 2.0}
        if rng.random() < 0.2:
            options |= {"regex": "[a-z ]{30,200}", "ignore_eos": False}
        prompt: str | list[int] = rng.choice(PROMPTS)
        if rng.random() < 0.3:
            prompt = (client.tokenize(str(prompt)) * 300)[:300]
            options["max_tokens"] = min(120, options["max_tokens"])
        answer = client.complete(prompt, **options)
        if len(answer.text) > 40 and rng.random() < 0.3:
            middle = len(answer.text) // 2
            options["stop"] = [answer.text[middle : middle + 5]]
            answer = client.complete(prompt, **options)
        cases.append(Case(prompt, options, answer.text, answer.tokens, answer.finish_reason))
    return cases


class Load:
    """Clients that send requests one after the other until they are stopped."""

    def __init__(self, address: str, cases: list[Case], clients: int, seed: int, attempts: int = 10) -> None:
        self._attempts = attempts
        self.history = History()
        self._address = address
        self._cases = cases
        self._flooding: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._paused = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(seed + i),), daemon=True) for i in range(clients)
        ]
        for thread in self._threads:
            thread.start()

    def pause(self, paused: bool) -> None:
        """Lets clients send no further requests for a while."""
        (self._paused.set if paused else self._paused.clear)()

    def flood(self) -> None:
        """Sends requests with long prompts, one more for each client, all at once."""
        longest = sorted(self._cases, key=lambda case: len(case.prompt))[-len(self._threads) :]
        for case in longest:
            thread = threading.Thread(target=self._alone, args=(case,), daemon=True)
            self._flooding.append(thread)
            thread.start()

    def stop(self) -> History:
        """Waits for the requests in flight."""
        self._stopping.set()
        for thread in (*self._threads, *self._flooding):
            thread.join(timeout=180)
            assert not thread.is_alive(), "a client waits for ever"
        return self.history

    def _alone(self, case: Case) -> None:
        with Client(self._address) as client:
            self._one(client, case)

    def _run(self, rng: random.Random) -> None:
        with Client(self._address, attempts=self._attempts) as client:
            while not self._stopping.is_set():
                if self._paused.is_set():
                    time.sleep(0.05)
                    continue
                self._one(client, rng.choice(self._cases))

    def _one(self, client: Client, case: Case) -> None:
        parts, last = [], time.monotonic()
        error = None
        try:
            for part in client.generate(case.prompt, **case.options):
                parts.append(part)
                pause, last = time.monotonic() - last, time.monotonic()
                with self._lock:
                    self.history.longest_pause = max(self.history.longest_pause, pause)
        except grpc.RpcError as raised:
            error = f"{raised.code()}: {raised.details()}, {time.monotonic() - last:.1f} s after the last part"
        tokens = tuple(token for part in parts for token in part.tokens)
        with self._lock:
            if error is not None:
                self.history.failed.append(error)
                if tokens != case.tokens[: len(tokens)]:
                    self.history.wrong.append(f"{case.options}: wrong before an error")
                return
            text, reason = "".join(part.text for part in parts), parts[-1].finish_reason
            if (tokens, text, reason) == (case.tokens, case.text, case.finish_reason):
                self.history.completed += 1
            else:
                at = next((i for i, (a, b) in enumerate(zip(tokens, case.tokens, strict=False)) if a != b), "the end")
                self.history.wrong.append(
                    f"{case.options}: {len(tokens)} of {len(case.tokens)} tokens, differs at {at}"
                )
