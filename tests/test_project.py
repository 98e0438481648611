"""Promises of the project as a whole: its walls, its public interface."""

from __future__ import annotations

import pathlib
import subprocess
import sys

from google.protobuf import descriptor_pb2

PROJECT = pathlib.Path(__file__).parent.parent


def test_the_control_plane_runs_without_jax() -> None:
    modules = [
        ".".join(path.relative_to(PROJECT).with_suffix("").parts)
        for path in (PROJECT / "cluster").rglob("*.py")
        if path.name != "__init__.py"
    ]
    code = f"import sys; [__import__(m) for m in {modules}]; print(*[m for m in ('jax', 'haiku') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert result.stdout.strip() == ""


def _fields(message: descriptor_pb2.DescriptorProto, scope: str) -> set[str]:
    """Everything that clients depend on, a line each."""
    name = f"{scope}.{message.name}"
    lines = {f"{name}.{f.name} = {f.number}: {f.type} {f.label} {f.type_name}" for f in message.field}
    for nested in message.nested_type:
        lines |= _fields(nested, name)
    return lines


def _interface(files: descriptor_pb2.FileDescriptorSet) -> set[str]:
    lines: set[str] = set()
    for file in files.file:
        for message in file.message_type:
            lines |= _fields(message, file.package)
        for enum in file.enum_type:
            lines |= {f"{file.package}.{enum.name}.{value.name} = {value.number}" for value in enum.value}
        for service in file.service:
            lines |= {
                f"{service.name}.{m.name}({m.input_type}) {m.server_streaming} {m.output_type}" for m in service.method
            }
    return lines


def test_nothing_that_clients_depend_on_is_taken_away(tmp_path: pathlib.Path) -> None:
    """The public interface holds at least what the golden descriptor holds; tools/update_descriptor.sh renews that."""
    built = tmp_path / "now.binpb"
    sources = sorted(str(path.relative_to(PROJECT)) for path in (PROJECT / "proto/grok/serving/v1").glob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", "-Iproto", f"--descriptor_set_out={built}", *sources]
    subprocess.run(command, check=True, cwd=PROJECT)
    now = _interface(descriptor_pb2.FileDescriptorSet.FromString(built.read_bytes()))
    golden = (PROJECT / "tests/golden/serving_v1.binpb").read_bytes()
    before = _interface(descriptor_pb2.FileDescriptorSet.FromString(golden))
    assert before
    assert before - now == set()
