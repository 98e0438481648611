"""`/v1/completions`: text that goes on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from cluster.gateway.errors import Violation, invalid
from cluster.gateway.openai.schema import MAX_PROMPTS, CompletionRequest
from cluster.gateway.openai.sessions import Sessions
from cluster.gateway.openai.translate import Shown, Spelling, finish_of, prompts_of, so_far, to_completion, usage_of
from cluster.gateway.validation import MAX_COMPLETIONS
from grok.serving.v1 import generation_pb2
from workers.text.tokenizer import Tokenizer

#: As with OpenAI.
DEFAULT_TOKENS = 16


class TextCompletions:
    """The answers to one request."""

    def __init__(self, request: CompletionRequest, tokenizer: Tokenizer, head: dict[str, Any]) -> None:
        """`head` begins every object of the answer. Raises GatewayError (INVALID_ARGUMENT)."""
        self._request = request
        self._head = {**head, "object": "text_completion"}
        self._spelling = Spelling(tokenizer)
        self._n = 1 if request.n is None else request.n
        self._drawn = max(self._n, request.best_of or 0)
        _check(request, self._n)
        #: Whether the prompts' tokens come with probabilities, as those of completions do.
        self._scores = bool(request.echo) and request.logprobs is not None
        self._prompts = prompts_of(request)
        max_tokens = DEFAULT_TOKENS if request.max_tokens is None else request.max_tokens
        self.completions = [to_completion(request, prompt, max_tokens, self._drawn) for prompt in self._prompts]
        for completion in self.completions:
            completion.top_logprobs = request.logprobs or 0
            if self._scores or (request.echo and max_tokens == 0):
                completion.score_from = 0
        self._tokenizer = tokenizer

    async def whole(self, sessions: Sessions) -> dict[str, Any]:
        answers = await sessions.whole(self.completions)
        echoed = self._echoed()
        choices: list[dict[str, Any]] = []
        for i, drawn in enumerate(answers):
            best = sorted(drawn, key=_mean_logprob, reverse=True)[: self._n] if self._drawn > self._n else drawn
            for answer in best:
                choice = self._choice(len(choices), echoed[i] + answer.text, answer.finish_reason)
                shown: Sequence[Shown] = [*drawn[0].prompt, *answer.tokens] if self._scores else answer.tokens
                choices.append(choice | self._logprobs(shown, 0 if self._scores else len(echoed[i])))
        usages = [answer.usage for drawn in answers for answer in drawn]
        return {**self._head, "choices": choices, "usage": usage_of(usages, self._drawn)}

    async def chunks(self, sessions: Sessions) -> AsyncIterator[dict[str, Any]]:
        """The objects of a stream."""
        options = self._request.stream_options
        usages: dict[int, generation_pb2.Usage] = {}
        head = self._head if options is None or not options.include_usage else {**self._head, "usage": None}
        offsets: list[int] = []
        async for prompt, part in sessions.parts(self.completions):
            if not offsets:
                echoed = [text for text in self._echoed() for _ in range(self._n)]
                offsets = [len(text) for text in echoed]
                for index, text in enumerate(echoed):
                    if text:
                        yield {**head, "choices": [self._choice(index, text, 0)]}
            index = prompt * self._n + part.index
            choice = self._choice(index, part.text, part.finish_reason) | self._logprobs(part.tokens, offsets[index])
            offsets[index] += len(part.text)
            if part.HasField("usage"):
                usages[index] = part.usage
            if part.text or part.finish_reason or "logprobs" in choice:
                yield {**head, "choices": [choice], **so_far(part, options)}
        if options is not None and options.include_usage:
            yield {**head, "choices": [], "usage": usage_of([usages[index] for index in sorted(usages)], self._n)}

    def _echoed(self) -> list[str]:
        """What comes before the completion of each prompt. For prompts that are known to be right: they may cost much else."""
        if not self._request.echo:
            return [""] * len(self._prompts)
        return [prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt) for prompt in self._prompts]

    def _choice(self, index: int, text: str, reason: generation_pb2.FinishReason.ValueType | int) -> dict[str, Any]:
        finish = finish_of(generation_pb2.FinishReason.ValueType(reason))
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}

    def _logprobs(self, tokens: Sequence[Shown], offset: int) -> dict[str, Any]:
        if self._request.logprobs is None:
            return {}
        return {"logprobs": self._spelling.of_text(tokens, offset)}


def _check(request: CompletionRequest, n: int) -> None:
    """Raises GatewayError for what only this interface knows."""
    violations = []
    if isinstance(request.prompt, list) and not request.prompt:
        violations.append(Violation("prompt", "is empty"))
    elif (
        len(request.prompt) > MAX_PROMPTS
        and not isinstance(request.prompt, str)
        and not isinstance(request.prompt[0], int)
    ):
        violations.append(Violation("prompt", f"has {len(request.prompt)} prompts; at most {MAX_PROMPTS}"))
    if request.best_of is not None and request.best_of < n:
        violations.append(Violation("best_of", f"is {request.best_of}; must be at least n={n}"))
    elif request.best_of is not None and request.best_of > MAX_COMPLETIONS:
        violations.append(Violation("best_of", f"is {request.best_of}; must be at most {MAX_COMPLETIONS}"))
    elif request.best_of is not None and request.best_of > n and request.stream:
        violations.append(Violation("best_of", "can't be streamed: which is best is known at the end"))
    if n < 1:
        violations.append(Violation("n", f"is {n}; must be at least 1"))
    if request.echo and request.logprobs is not None and request.stream:
        violations.append(Violation("stream", "can't be set together with echo and logprobs"))
    if violations:
        raise invalid(violations)


def _mean_logprob(answer: generation_pb2.GenerateOnceResponse) -> float:
    return sum(token.logprob for token in answer.tokens) / max(len(answer.tokens), 1)
