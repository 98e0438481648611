"""The page on which people try the model; it has no other part than its own text."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import importlib.resources
import re


@dataclasses.dataclass(frozen=True)
class Playground:
    """The page, and what browsers may do with it: run its own script, and ask the gateway that it came from."""

    text: str
    policy: str

    @classmethod
    def read(cls) -> Playground:
        text = importlib.resources.files("cluster.gateway.openai").joinpath("playground.html").read_text()

        def digest(tag: str) -> str:
            (part,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
            return f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"

        policy = (
            f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        return cls(text, policy)
