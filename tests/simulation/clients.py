"""Clients, which know what they have to get."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import random
from collections.abc import Callable

from cluster.gateway.auth.api_keys import Caller
from cluster.gateway.errors import KEY_LIMIT, GatewayError
from grok.serving.v1 import generation_pb2
from tests.simulation.devices import completion, score
from tests.simulation.service import GoneError, SimGateway
from tests.simulation.workers import CONTEXT
from tests.simulation.world import World

#: Virtual seconds within which gateways know of each other's requests, while there is a controller, and between looks at what
#: they have: a request may be over, and the next one there, between two of them, while a gateway reports.
KNOWN_SECONDS, LOOK_SECONDS = 1.0, 0.002
#: Virtual seconds after which many clients come together; others come when they like.
TOGETHER = (3.0, 12.0)


@dataclasses.dataclass
class Report:
    """What clients saw.

    Attributes:
      whole: streams that were as they should be.
      left: streams that their clients have left, or cancelled by their names.
      resumed: how often one went on at another gateway.
      longest: virtual seconds that one took.
      errors: that reached a client.
    """

    whole: int = 0
    left: int = 0
    resumed: int = 0
    longest: float = 0.0
    errors: list[str] = dataclasses.field(default_factory=list)


class Clients:
    """So many clients of some gateways, each with one stream."""

    def __init__(
        self, world: World, gateways: list[SimGateway], on_left: Callable[[str], None], *, scoring: bool
    ) -> None:
        """`on_left` gets the ids of requests whose clients have left. With `scoring` some prompts are scored."""
        self._scoring = scoring
        self.report = Report()
        self._on_left = on_left
        self._world, self._gateways = world, gateways
        rng = random.Random(world.rng.getrandbits(32))
        self._prefixes = [[rng.randrange(3, 2000) for _ in range(80)] for _ in range(3)]
        self._said: list[list[int]] = []

    async def one(self, name: str, seed: int) -> None:
        """A client that a seed describes."""
        world, rng, whims = self._world, random.Random(seed), random.Random(seed + 1)
        await asyncio.sleep(rng.choice((*TOGETHER, rng.uniform(0, 25))))
        prompt = self._prompt(rng)
        most, seed = rng.randint(1, min(90, CONTEXT - len(prompt))), rng.getrandbits(31)
        wanted = list(completion(tuple(prompt), seed, most))
        leaves = rng.randint(1, 40) if rng.random() < 0.15 else None
        slow = rng.uniform(0, 1.5) if rng.random() < 0.15 else 0.0
        breaks = rng.randint(1, 30) if rng.random() < 0.2 else None
        cancels = whims.randint(1, 40) if whims.random() < 0.05 else None
        sampling = generation_pb2.SamplingParams(seed=seed, temperature=1.0)
        asked = generation_pb2.Completion(max_tokens=most, sampling=sampling)
        asked.tokens.ids.extend(prompt)
        first = rng.randrange(len(prompt)) if rng.random() < 0.2 and self._scoring else None
        if first is not None:
            asked.score_from = first
        seen = list[tuple[int, float]]()
        caller = Caller(rng.choice(("alice", "bob", "carol")))
        got: list[int] = []
        finish, began, cancelled = 0, world.loop.time(), ""
        while not finish:
            running = [gateway for gateway in self._gateways if not gateway.process.dead.is_set()]
            if not running:
                await asyncio.sleep(0.02)
                continue
            call = rng.choice(running).begin(generation_pb2.GenerateRequest(completion=asked), caller)
            try:
                while not finish and (part := await call.next()) is not None:
                    seen += [(token.id, token.logprob) for token in part.prompt]
                    got += [token.id for token in part.tokens]
                    finish = part.finish_reason
                    assert got == wanted[: len(got)], f"{name}: {got} is not {wanted}"
                    if leaves is not None and len(got) >= leaves:
                        self.report.left += 1
                        self._on_left(part.request_id)
                        return
                    if cancels is not None and len(got) >= cancels:
                        cancels, cancelled = None, part.request_id
                        whims.choice(running).cancel(cancelled)
                    if breaks is not None and len(got) >= breaks and not finish:
                        breaks = None
                        break
                    if slow:
                        await asyncio.sleep(slow)
            except GatewayError as error:
                if error.reason == "CANCELLED" and cancelled:
                    self.report.left += 1
                    self._on_left(cancelled)
                    return
                waited = world.loop.time() - began
                self.report.errors.append(f"{name} after {waited:.1f} s: {error.code.name}: {error}")
                return
            except GoneError:
                pass
            finally:
                call.leave()
            if not finish:
                self.report.resumed += 1
                del asked.resume.ids[:]
                asked.resume.ids.extend(got)
                if got:
                    asked.ClearField("score_from")
                elif first is not None:
                    asked.score_from = first + len(seen)
                await asyncio.sleep(rng.uniform(0, 0.5))
        assert got == wanted, f"{name}: {len(got)} of {len(wanted)} tokens"
        places = range(len(prompt) if first is None else first, len(prompt))
        scores = [(prompt[i], score(prompt[: i + 1]).logprob if i else 0.0) for i in places]
        assert seen == scores, f"{name}: {seen} is not {scores}"
        self._said.append([*prompt, *got])
        self.report.whole += 1
        self.report.longest = max(self.report.longest, world.loop.time() - began)

    async def odd(self, token: int, reason: str, later: float) -> None:
        """A request, some seconds later, with a token that devices can't compute gets an error with this reason, unless its
        gateway dies."""
        await asyncio.sleep(later)
        rng = random.Random(self._world.rng.getrandbits(32))
        asked = generation_pb2.Completion(max_tokens=9)
        asked.tokens.ids.extend([*self._prompt(rng)[:40], token])
        running = [gateway for gateway in self._gateways if gateway.process.runs]
        if not running:
            return
        call = rng.choice(running).begin(generation_pb2.GenerateRequest(completion=asked), Caller("mallory"))
        try:
            while await call.next() is not None:
                self._world.defects.append(f"a request with token {token} gets something")
        except GatewayError as error:
            if error.reason != reason:
                self._world.defects.append(f"a request with token {token} ends with {error.reason}: {error}")
        except GoneError:
            pass
        finally:
            call.leave()

    async def flood(self, seed: int, counts: bool) -> None:
        """A key sends far more requests than it may have under way. Each is whole or refused for that, unless its gateway dies;
        with `counts`, no more are admitted than may be, once gateways know of each other's."""
        world, rng = self._world, random.Random(seed)
        most = rng.randint(1, 6)
        caller = Caller(f"flood-{seed}", max_requests=most)

        async def one() -> None:
            await asyncio.sleep(rng.choice((0.0, rng.uniform(0, 8))))
            asked = generation_pb2.Completion(max_tokens=rng.randint(1, 60))
            asked.sampling.seed, asked.sampling.temperature = 5, 1.0
            asked.tokens.ids.extend(self._prompt(rng)[:20])
            wanted = list(completion(tuple(asked.tokens.ids), 5, asked.max_tokens))
            running = [gateway for gateway in self._gateways if gateway.process.runs]
            if not running:
                return
            call, got = rng.choice(running).begin(generation_pb2.GenerateRequest(completion=asked), caller), list[int]()
            try:
                while (part := await call.next()) is not None:
                    got += [token.id for token in part.tokens]
                if got != wanted:
                    world.defects.append(f"a request of a flood gets {got}, not {wanted}")
            except GatewayError as error:
                if error.reason != KEY_LIMIT:
                    world.defects.append(f"a request of a flood ends with {error.reason}: {error}")
            except GoneError:
                pass
            finally:
                call.leave()

        async def count() -> None:
            """What others have had for a while, a gateway knows when it admits one more."""
            history: collections.deque[dict[str, int]] = collections.deque(maxlen=round(KNOWN_SECONDS / LOOK_SECONDS))
            while True:
                own = {g.name: g.admission._by_key[caller.name] for g in self._gateways}
                for name, held in own.items():
                    more = history and held > history[-1].get(name, 0)
                    known = (
                        sum(min(old.get(other, 0) for old in history) for other in own if other != name) if more else 0
                    )
                    if held + known > most:
                        world.defects.append(f"a key that may have {most} requests has {held}, and {known} elsewhere")
                history.append(own)
                await asyncio.sleep(LOOK_SECONDS)

        counting = asyncio.ensure_future(count()) if counts else None
        await asyncio.gather(*(one() for _ in range(rng.randint(5, 40))))
        if counting is not None:
            counting.cancel()

    def _prompt(self, rng: random.Random) -> list[int]:
        if self._said and rng.random() < 0.3:  # the next turn of a conversation
            return [*rng.choice(self._said)[: CONTEXT - 40], *(rng.randrange(3, 2000) for _ in range(3))]
        prefix = rng.choice(self._prefixes)[: rng.randint(1, 80)]
        return [*prefix, *(rng.randrange(3, 2000) for _ in range(rng.randint(0, 5)))]
