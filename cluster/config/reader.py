"""Reads `ray_config.yaml`, the one file that an operator edits: typed and checked, with the line of whatever is wrong."""

from __future__ import annotations

import dataclasses
import pathlib
import types
import typing
from typing import Annotated, Any

import yaml

from cluster.config.schema import Config, ConfigError, problems
from workers.messages.constraints import Constraint


def load_config(path: pathlib.Path) -> Config:
    """Reads and checks a configuration.

    Raises:
      ConfigError: it is missing, no YAML, or says something impossible.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else f"{path}"
        raise ConfigError(f"{where}: not YAML: {getattr(error, 'problem', error)}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply") from error
    reader = _Reader(path)
    config: Config = reader.section(Config, root, "")
    checkpoint = config.model.checkpoint
    if "://" not in checkpoint:
        checkpoint = str(reader.path("model.checkpoint", checkpoint))
    model = dataclasses.replace(config.model, checkpoint=checkpoint)
    files: dict[str, Any] = {
        name: reader.path(f"gateway.{name}", file)
        for name in ("api_keys", "tls_certificate", "tls_key", "tls_client_ca")
        if (file := getattr(config.gateway, name)) is not None
    }
    gateway = dataclasses.replace(config.gateway, **files)
    config = dataclasses.replace(config, model=model, gateway=gateway)
    for name, problem in problems(config):
        reader.fail(name, problem)
    return config


class _Reader:
    """Builds frozen dataclasses from YAML nodes, remembering the line of each value."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._lines: dict[str, int] = {}

    def fail(self, name: str, problem: str) -> typing.NoReturn:
        line = self._lines.get(name) or self._lines.get(name.rpartition(".")[0])
        raise ConfigError(f"{self._path}{f':{line}' if line else ''}: {problem}")

    def path(self, name: str, value: str | pathlib.Path) -> pathlib.Path:
        """A file or folder, relative to the configuration's."""
        try:
            return (self._path.parent / pathlib.Path(value).expanduser()).resolve()
        except (RuntimeError, ValueError, OSError) as error:
            self.fail(name, f"{name}={value}: {error}; write the whole path")

    def section(self, cls: type[Any], node: yaml.Node | None, name: str) -> Any:
        """An instance of the dataclass `cls` from a mapping."""
        if not isinstance(node, yaml.MappingNode):
            self.fail(name, f"{name or 'the file'} must be a mapping of settings")
        hints: dict[str, Any] = typing.get_type_hints(cls, include_extras=True)
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            full = f"{name}.{key}" if name else key
            self._lines[full] = key_node.start_mark.line + 1
            if key not in hints:
                self.fail(full, f"unknown setting {full}; known are {', '.join(hints)}")
            if key in values:
                self.fail(full, f"{full} is set twice")
            hint = hints[key]
            values[key] = (
                self.section(hint, value_node, full)
                if isinstance(hint, type) and dataclasses.is_dataclass(hint)
                else self._value(hint, value_node, full)
            )
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        for key in required:
            if key not in values:
                self.fail(name, f"{f'{name}.' if name else ''}{key} is missing")
        return cls(**values)

    def _value(self, hint: Any, node: yaml.Node, name: str) -> Any:
        """A value of a type, for which all constraints of an Annotated one hold."""
        constraints: tuple[Constraint, ...] = ()
        if typing.get_origin(hint) is Annotated:
            hint, *found = typing.get_args(hint)
            constraints = tuple(found)
        value = self._typed(hint, node, name)
        for problem in (constraint.problem(value) for constraint in constraints if value is not None):
            if problem:
                self.fail(name, f"{name}={value} {problem}")
        return value

    def _typed(self, hint: Any, node: yaml.Node, name: str) -> Any:
        value: Any = node
        if isinstance(node, yaml.ScalarNode):
            try:
                value = yaml.SafeLoader("").construct_object(node)
            except (yaml.YAMLError, ValueError) as error:
                self.fail(name, f"{name}: {error}")
        allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if value is None and type(None) in allowed:
            return None
        for kind in allowed:
            if kind is pathlib.Path and isinstance(value, str):
                return pathlib.Path(value)
            if kind is float and isinstance(value, int) and not isinstance(value, bool):
                return float(value)
            if type(value) is kind:
                return value
        shown = value if isinstance(node, yaml.ScalarNode) else "a list or mapping"
        wanted = " or ".join(kind.__name__.replace("NoneType", "nothing") for kind in allowed)
        self.fail(name, f"{name}: expected {wanted}, got {shown!r}")
