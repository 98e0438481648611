"""The Jinja template that lies beside a checkpoint and makes one text of a chat's messages."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox

from cluster.config.schema import ConfigError
from cluster.gateway.errors import Violation, invalid
from workers.checkpoint.storage import Location

FILE, CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"


class TemplateError(ConfigError):
    """A chat template that can't be read."""


class ChatTemplate:
    """A template of Jinja, in its sandbox."""

    def __init__(self, source: str, name: str, end: str) -> None:
        """`end` is how the model's end token is written. Raises TemplateError, which names the file `name`."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_raise, strftime_now=_now)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise TemplateError(f"{name}: {error}") from error
        self.source = source
        self._end = end
        #: Whether it does something with tools.
        self.knows_tools = "tools" in source

    def render(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None) -> str:
        """The prompt of a chat, up to where the assistant's answer begins. Raises GatewayError (INVALID_ARGUMENT)."""
        try:
            return self._template.render(
                messages=messages, tools=tools, add_generation_prompt=True, bos_token="", eos_token=self._end
            )
        except (jinja2.TemplateError, TypeError, ValueError, RecursionError) as error:
            raise invalid([Violation("messages", f"the chat template refuses them: {error}")]) from error


def read_template(folder: Location, end: str) -> ChatTemplate | None:
    """The template of a checkpoint; None if there is none. Raises TemplateError."""
    file, config = folder / FILE, folder / CONFIG_FILE
    try:
        if file.is_file():
            return ChatTemplate(file.read_bytes().decode(), str(file), end)
        if config.is_file():
            source = json.loads(config.read_bytes()).get("chat_template")
            return ChatTemplate(source, str(config), end) if isinstance(source, str) else None
    except TemplateError:
        raise
    except (OSError, ValueError, AttributeError) as error:
        raise TemplateError(f"{folder}: {error}") from error
    return None


def _to_json(value: object, **options: Any) -> str:
    """As templates expect it: not made safe for HTML."""
    return json.dumps(value, ensure_ascii=False, **options)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now(datetime.UTC).strftime(form)
