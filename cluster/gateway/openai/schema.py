"""What clients send: OpenAI's fields, and those that servers of open models have besides. A field that is not here is refused
by its name; what is in range, the gateway's validation decides."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic

#: Prompts of one request.
MAX_PROMPTS = 64

#: Numbers that the service's own messages can hold.
Int32 = Annotated[int, pydantic.Field(ge=-(2**31), lt=2**31)]
TokenId = Annotated[int, pydantic.Field(ge=0, lt=2**32)]
Seed = Annotated[int, pydantic.Field(ge=0, lt=2**64)]
Tokens = list[TokenId]


class _Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Model):
    """What a stream carries besides: usage in a last chunk, or in each."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class StructuredOutputs(_Model):
    """What the text must be; one of these."""

    json_schema: dict[str, Any] | str | None = pydantic.Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: Literal[True] | None = None

    @pydantic.model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        if sum(value is not None for _, value in self) != 1:
            raise ValueError("must have one of json, regex, choice, grammar and json_object")
        return self


class _Request(_Model):
    """Fields that completions of text and of chats share."""

    model: str
    max_tokens: Int32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: Int32 | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    #: Names the client's own user; nothing comes of it.
    user: str | None = None
    # Beyond OpenAI's.
    top_k: Int32 | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: Int32 | None = None
    stop_token_ids: Tokens | None = None
    allowed_token_ids: Tokens | None = None
    bad_words: list[str] | None = None
    cache_salt: str | None = None
    priority: Int32 | None = None
    structured_outputs: StructuredOutputs | None = None

    @pydantic.field_validator("logit_bias")
    @classmethod
    def _tokens(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for token in value or ():
            if not token.isdecimal() or not token.isascii() or int(token) >= 2**32:
                raise ValueError(f"has {token!r} where a token's id must be")
        return value


class CompletionRequest(_Request):
    """Of `/v1/completions`."""

    prompt: str | list[str] | Tokens | list[Tokens]
    echo: bool | None = None
    logprobs: Int32 | None = None
    best_of: Int32 | None = None


class TextPart(_Model):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Function(_Model):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Model):
    """Something that the model may use."""

    type: Literal["function"]
    function: Function


class FunctionCall(_Model):
    """A call that the model has asked for; `arguments` is JSON."""

    name: str
    arguments: str


class ToolCall(_Model):
    """A use of a tool that the model has asked for."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class Message(_Model):
    """One of a chat's messages."""

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None


class NamedFunction(_Model):
    """A function's name."""

    name: str


class NamedTool(_Model):
    """The one tool that is to be used."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(_Model):
    """A named JSON schema."""

    name: str
    description: str | None = None
    json_schema: dict[str, Any] = pydantic.Field(alias="schema")
    strict: bool | None = None


class TextFormat(_Model):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(_Model):
    """Some JSON object."""

    type: Literal["json_object"]


class Structure(_Model):
    """A part of a text: it begins with `begin`, fits a schema, and ends with `end`."""

    begin: str
    json_schema: dict[str, Any] = pydantic.Field(alias="schema")
    end: str


class StructuralTagFormat(_Model):
    """Any text; what comes behind one of the triggers is one of the parts that begin with it."""

    type: Literal["structural_tag"]
    structures: list[Structure]
    triggers: list[str]


class JsonSchemaFormat(_Model):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class ChatRequest(_Request):
    """Of `/v1/chat/completions`."""

    messages: Annotated[list[Message], pydantic.Field(min_length=1)]
    max_completion_tokens: Int32 | None = None
    logprobs: bool | None = None
    top_logprobs: Int32 | None = None
    response_format: (
        Annotated[
            TextFormat | JsonObjectFormat | JsonSchemaFormat | StructuralTagFormat,
            pydantic.Field(discriminator="type"),
        ]
        | None
    ) = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    # What OpenAI keeps and reports; nothing comes of them.
    metadata: dict[str, str] | None = None
    store: bool | None = None


class InputText(_Model):
    """A part of what was said."""

    type: Literal["input_text", "output_text"]
    text: str
    # Of an earlier answer, which comes back as it was.
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class _Item(_Model):
    """A part of a chat. An answer's parts have a name and a state, and come back as they were."""

    id: str | None = None
    status: str | None = None


class InputMessage(_Item):
    """What was said."""

    type: Literal["message"] | None = None
    role: str
    content: str | list[InputText]


class InputCall(_Item):
    """A call that the model has asked for; `arguments` is JSON."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class InputCallOutput(_Item):
    """What came of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: str


class ResponseJsonSchema(JsonSchema):
    """JSON that fits a schema."""

    type: Literal["json_schema"]


class ResponseText(_Model):
    """What the text must be."""

    format: (
        Annotated[TextFormat | JsonObjectFormat | ResponseJsonSchema, pydantic.Field(discriminator="type")] | None
    ) = None


class ResponseTool(Function):
    """A function that the model may call."""

    type: Literal["function"]


class ResponseNamedTool(NamedFunction):
    """The one function that is to be called."""

    type: Literal["function"]


class ResponsesRequest(_Model):
    """Of `/v1/responses`."""

    model: str
    input: str | Annotated[list[InputMessage | InputCall | InputCallOutput], pydantic.Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Int32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: Seed | None = None
    stream: bool | None = None
    text: ResponseText | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseNamedTool | None = None
    truncation: Literal["disabled"] | None = None
    # What OpenAI keeps and reports; nothing comes of them.
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    user: str | None = None


class CancelRequest(_Model):
    """Of `/cancel`: the request's name, as its answer's header `x-request-id` has it."""

    request_id: str


class TokenizeRequest(_Model):
    """Of `/tokenize`."""

    model: str | None = None
    prompt: str
    #: Grok-1 has none before a text; nothing comes of it.
    add_special_tokens: bool | None = None


class DetokenizeRequest(_Model):
    """Of `/detokenize`."""

    model: str | None = None
    tokens: Tokens
