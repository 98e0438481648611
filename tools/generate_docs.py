"""Writes docs/api.md from the .proto files and docs/configuration.md from the typed configuration: generate_docs.py [DIR]"""

from __future__ import annotations

import dataclasses
import inspect
import pathlib
import re
import subprocess
import sys
import tempfile
import typing
from collections.abc import Sequence
from typing import Any

from google.protobuf import descriptor_pb2

from cluster.config.schema import Config

PROJECT = pathlib.Path(__file__).parent.parent
_NOTE = "<!-- Made by tools/generate_docs.py; change its sources, not this file. -->\n"
_FIELD, _MESSAGE, _ENUM, _SERVICE = 2, 4, 5, 6  # field numbers of descriptors, which make up the paths of comments


def main(folder: pathlib.Path) -> None:
    """Writes both files."""
    (folder / "api.md").write_text(api_reference())
    (folder / "configuration.md").write_text(configuration_reference())


def configuration_reference() -> str:
    """Every setting of `ray_config.yaml` with its type, what it is if absent, and what it means."""
    lines = [
        "# Configuration",
        "",
        _NOTE,
        "All settings of `ray_config.yaml`. Unknown settings are refused, with the line where they stand.",
        "",
    ]
    hints = typing.get_type_hints(Config)
    sections = [field for field in dataclasses.fields(Config) if dataclasses.is_dataclass(hints[field.name])]
    plain = [field for field in dataclasses.fields(Config) if field not in sections]
    lines += ["## At the top", "", *_settings(Config, plain), ""]
    for section in sections:
        summary = (inspect.getdoc(hints[section.name]) or "").split("\n\n")[0]
        lines += [f"## {section.name}", "", summary, "", *_settings(hints[section.name], None), ""]
    return "\n".join(lines)


def _settings(cls: type[Any], fields: Sequence[dataclasses.Field[Any]] | None) -> list[str]:
    meanings = _attributes(cls)
    hints = typing.get_type_hints(cls)
    lines = ["| setting | type | if absent | meaning |", "|---|---|---|---|"]
    for field in fields if fields is not None else dataclasses.fields(cls):
        default = "required" if field.default is dataclasses.MISSING else _shown(field.default)
        lines.append(f"| `{field.name}` | {_type(hints[field.name])} | {default} | {meanings[field.name]} |")
    return lines


def _shown(value: object) -> str:
    return "nothing" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _type(hint: Any) -> str:
    kinds = typing.get_args(hint) or (hint,)
    names = {"str": "text", "Path": "path", "float": "number", "int": "integer", "bool": "true or false"}
    return " or ".join(names.get(kind.__name__, kind.__name__) for kind in kinds if kind is not type(None))


def _attributes(cls: type[Any]) -> dict[str, str]:
    """What a dataclass's docstring says of its attributes."""
    _, _, text = (inspect.getdoc(cls) or "").partition("Attributes:\n")
    meanings: dict[str, str] = {}
    for entry in re.split(r"\n(?=  \S)", text.rstrip()):
        names, _, meaning = entry.strip().partition(": ")
        for name in names.split(", "):
            meanings[name] = " ".join(meaning.split())
    return meanings


def api_reference() -> str:
    """Services, messages and enums of the public interface, with the comments of the .proto files."""
    lines = [
        "# API",
        "",
        _NOTE,
        "The public gRPC interface, package `grok.serving.v1`. The gateway has server reflection and `grpc.health.v1` too.",
        "Errors are `google.rpc.Status` with details: `BadRequest` names each wrong field, `RetryInfo` says when to try again,",
        'and `ErrorInfo` has a reason of domain "grokmesh". A call that meets a gateway as it stops is ended by gRPC itself,',
        "with CANCELLED and no details: it has done nothing, and may be sent again, as the Python client does.",
        "",
    ]
    for file in _descriptors().file:
        comments = {tuple(place.path): place.leading_comments for place in file.source_code_info.location}
        for i, service in enumerate(file.service):
            lines += [f"## {service.name}", "", _text(comments, (_SERVICE, i)), ""]
            for j, method in enumerate(service.method):
                stream = "stream " if method.server_streaming else ""
                lines += [
                    f"### {service.name}.{method.name}",
                    "",
                    f"{_link(method.input_type)} → {stream}{_link(method.output_type)}",
                    "",
                    _text(comments, (_SERVICE, i, _FIELD, j)),
                    "",
                ]
        for i, message in enumerate(file.message_type):
            lines += _message(comments, message, (_MESSAGE, i))
        for i, enum in enumerate(file.enum_type):
            lines += [
                f"## {enum.name}",
                "",
                _text(comments, (_ENUM, i)),
                "",
                "| value | number | meaning |",
                "|---|---|---|",
            ]
            for j, value in enumerate(enum.value):
                lines.append(f"| `{value.name}` | {value.number} | {_text(comments, (_ENUM, i, _FIELD, j))} |")
            lines.append("")
    return "\n".join(lines)


def _descriptors() -> descriptor_pb2.FileDescriptorSet:
    sources = sorted(str(path.relative_to(PROJECT)) for path in (PROJECT / "proto/grok/serving/v1").glob("*.proto"))
    with tempfile.NamedTemporaryFile() as built:
        options = ["-Iproto", "--include_source_info", f"--descriptor_set_out={built.name}"]
        subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *options, *sources], check=True, cwd=PROJECT)
        return descriptor_pb2.FileDescriptorSet.FromString(pathlib.Path(built.name).read_bytes())


def _message(
    comments: dict[tuple[int, ...], str], message: descriptor_pb2.DescriptorProto, path: tuple[int, ...]
) -> list[str]:
    lines = [f"## {message.name}", "", _text(comments, path), ""]
    maps = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
    if message.field:
        lines += ["| field | type | meaning |", "|---|---|---|"]
    for i, field in enumerate(message.field):
        entry = maps.get(field.type_name.rsplit(".", 1)[-1])
        if entry is not None:
            kind = f"map of {_kind(entry.field[0])} to {_kind(entry.field[1])}"
        else:
            repeated = field.label == descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED
            kind = f"repeated {_kind(field)}" if repeated else _kind(field)
        if field.proto3_optional:
            kind = f"optional {kind}"
        elif field.HasField("oneof_index"):
            kind += f", one of `{message.oneof_decl[field.oneof_index].name}`"
        lines.append(f"| `{field.name}` | {kind} | {_text(comments, (*path, _FIELD, i))} |")
    return [*lines, ""] if message.field else lines


def _kind(field: descriptor_pb2.FieldDescriptorProto) -> str:
    if field.type_name:
        return _link(field.type_name)
    name: str = descriptor_pb2.FieldDescriptorProto.Type.Name(field.type)
    return name.removeprefix("TYPE_").lower()


def _link(type_name: str) -> str:
    name = type_name.rsplit(".", 1)[-1]
    return f"[{name}](#{name.lower()})"


def _text(comments: dict[tuple[int, ...], str], path: tuple[int, ...]) -> str:
    return " ".join(comments[path].split())


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else PROJECT / "docs")
