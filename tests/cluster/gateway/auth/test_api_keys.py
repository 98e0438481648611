"""API keys: what is made is taken, what is not is refused, and nothing but hashes is kept."""

from __future__ import annotations

import pathlib

import grpc
import pytest

from cluster.cli import main
from cluster.gateway.auth import reloading
from cluster.gateway.auth.api_keys import Caller, Keys, KeysError, new_key
from cluster.gateway.errors import GatewayError


def test_a_new_key_is_known_by_its_hash_alone(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "keys.yaml"
    made = {name: new_key(name) for name in ("alice", "team-b.7")}
    path.write_text("\n".join(line for _, line in made.values()))
    keys = Keys(path)
    for name, (key, line) in made.items():
        assert keys.caller((("authorization", f"Bearer {key}"),)) == Caller(name)
        assert keys.caller((("x", "y"), ("authorization", f"bearer  {key} "))) == Caller(name)
        assert key not in line


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", ""),),
        (("authorization", "Bearer wrong"),),
        (("authorization", "Basic abc"),),
        (("authorization", b"\xff"),),
    ],
)
def test_other_callers_are_refused(metadata: tuple[tuple[str, str | bytes], ...], tmp_path: pathlib.Path) -> None:
    (tmp_path / "keys.yaml").write_text(new_key("alice")[1])
    keys = Keys(tmp_path / "keys.yaml")
    with pytest.raises(GatewayError) as refused:
        keys.caller(metadata)
    assert refused.value.code is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("text", ["", "- a", "alice: secret", "alice: 12", "Bad Name: " + "0" * 64, "{", "a: [b"])
def test_a_file_that_holds_no_keys_is_refused_by_name(text: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(KeysError, match=r"keys\.yaml[:0-9]*: "):
        Keys(path)
    with pytest.raises(KeysError):
        Keys(tmp_path / "absent.yaml")


def test_a_key_may_have_scopes_and_limits(tmp_path: pathlib.Path) -> None:
    key, line = new_key("alice")
    digest = line.split()[1]
    path = tmp_path / "keys.yaml"
    path.write_text(
        f"alice: {{sha256: {digest}, scopes: [generate, admin], max_requests: 4, tokens_per_minute: 6000, max_priority: 3}}\n"
    )
    keys = Keys(path)
    caller = Caller("alice", ("generate", "admin"), max_requests=4, tokens_per_minute=6000, max_priority=3)
    assert keys.caller((("authorization", f"Bearer {key}"),)) == caller


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ("scopes: [root]", "scopes must be a list of generate and admin"),
        ("scopes: generate", "scopes must be a list of generate and admin"),
        ("max_requests: 0", "max_requests=0 must be a whole number of at least 1"),
        ("scopes: [[admin]]", "scopes must be a list of generate and admin"),
        ("max_priority: 11", "max_priority=11 must be a whole number from -10 to 10"),
        ("tokens_per_minute: 1.5", "tokens_per_minute=1.5 must be a whole number of at least 1"),
        ("max_request: 3", "max_request is unknown; use sha256, scopes, max_requests, tokens_per_minute"),
    ],
)
def test_wrong_limits_are_refused_by_name(fields: str, problem: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(f"alice: {{sha256: {'a' * 64}, {fields}}}\n")
    with pytest.raises(KeysError, match=f"alice: {problem}"):
        Keys(path)


def test_two_names_can_not_share_a_key(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(f"alice: {'a' * 64}\nbob: {'a' * 64}\n")
    with pytest.raises(KeysError, match="bob has the key of alice"):
        Keys(path)


def test_the_command_prints_a_line_for_the_file_apart_from_the_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["key", "alice"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("alice: ")
    assert len(printed.out.split()) == 2
    assert "gm-" in printed.err
    assert "gm-" not in printed.out
    assert main(["key", "Not A Name"]) == 2
    assert "is no name for a key" in capsys.readouterr().err


def test_a_file_that_changes_counts_without_a_restart(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reloading, "LOOK_SECONDS", 0.0)
    path = tmp_path / "keys.yaml"
    (first, line), (second, other) = new_key("alice"), new_key("bob")
    path.write_text(line)
    keys = Keys(path)
    path.write_text(other)
    assert keys.caller((("authorization", f"Bearer {second}"),)) == Caller("bob")
    with pytest.raises(GatewayError):
        keys.caller((("authorization", f"Bearer {first}"),))
    path.write_text("nonsense")
    assert keys.caller((("authorization", f"Bearer {second}"),)) == Caller("bob")


@pytest.mark.parametrize("name", ["no", "on", "off", "yes", "true", "null", "1.10", "010", "1e3"])
def test_a_name_is_taken_as_it_stands(name: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "keys.yaml"
    key, line = new_key(name)
    path.write_text(line)
    assert Keys(path).caller((("authorization", f"Bearer {key}"),)) == Caller(name)


def test_a_name_or_a_limit_that_is_there_twice_is_refused_with_its_line(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(f"alice: {'a' * 64}\nalice: {'b' * 64}\n")
    with pytest.raises(KeysError, match=r"keys\.yaml:2: alice is there twice"):
        Keys(path)
    path.write_text(f"alice: {{sha256: {'a' * 64}, max_requests: 1, max_requests: 9}}\n")
    with pytest.raises(KeysError, match="max_requests is there twice"):
        Keys(path)


def test_without_a_file_anybody_may_complete_and_only_the_local_user_may_administer() -> None:
    keys = Keys(None, "gm-local-secret")
    stranger = keys.caller(())
    assert (stranger.scopes, stranger.max_priority) == (("generate",), 0)
    assert keys.caller((("authorization", "Bearer gm-whatever"),)) == stranger
    assert "admin" in keys.caller((("authorization", "Bearer gm-local-secret"),)).scopes
    assert Keys(None).caller((("authorization", "Bearer "),)) == stranger
