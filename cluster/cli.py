"""The `grokmesh` command."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import grpc

from cluster import capacity, daemon
from cluster.config.reader import ACTIVATIONS, KV_CACHES, WEIGHTS, ConfigError, load_config
from cluster.gateway.auth.api_keys import KeysError, new_key
from cluster.gateway.auth.tls import TlsError
from cluster.local_ray import LocalClusterError, prepare_environment
from grok.serving.v1 import cluster_pb2
from grokmesh import (
    DEFAULT_ADDRESS,
    Client,
    ClientError,
    Options,
    Tls,
    completion_request,
)
from workers.capacity.hardware import HardwareError
from workers.checkpoint.errors import CheckpointError
from workers.checkpoint.storage import locate
from workers.messages.specs import describe_loading
from workers.model.config import ConfigError as ModelConfigError
from workers.model.layout import RULES
from workers.telemetry import logs
from workers.text.tokenizer import TokenizerError

CONFIG = pathlib.Path("ray_config.yaml")
#: Environment variable that holds an API key.
API_KEY_VARIABLE = "GROKMESH_API_KEY"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code. What the user did wrong is said in one line, with code 2."""
    parsed = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal need not know every character of a model's
    if sys.flags.optimize:
        print(
            "grokmesh: without assertions neither Haiku nor Ray works: unset PYTHONOPTIMIZE, leave out -O",
            file=sys.stderr,
        )
        return 2
    try:
        result: int = parsed.run(parsed)
        return result
    except (
        ConfigError,
        CheckpointError,
        ModelConfigError,
        TokenizerError,
        daemon.DaemonError,
        KeysError,
        HardwareError,
        LocalClusterError,
        TlsError,
        ClientError,
    ) as error:
        print(f"grokmesh: {error}", file=sys.stderr)
        return 2
    except grpc.RpcError as error:
        call: Any = error  # what stubs raise is a call too
        print(f"grokmesh: {call.code().name}: {call.details()}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, BrokenPipeError):
        return 130
    except OSError as error:  # a port in use, a file that can't be read
        print(f"grokmesh: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="grokmesh", description="Serves Grok-1 from many hosts as one device mesh.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="start replicas and gateway as ray_config.yaml says")
    serve.add_argument("--config", type=pathlib.Path, default=CONFIG, help="configuration (default: %(default)s)")
    serve.add_argument("--detach", action="store_true", help="leave it running in the background, once it serves")
    serve.add_argument(
        "--timeout",
        type=float,
        default=600,
        help="seconds that --detach waits; 0: only until the gateway listens (default: %(default)s)",
    )
    serve.add_argument(
        "--replace", action="store_true", help="take over from the running service, once this one is ready to serve"
    )
    serve.set_defaults(run=_serve)

    generate = commands.add_parser("generate", help="stream a completion of a prompt")
    generate.add_argument("prompt")
    _address(generate)
    generate.add_argument("--max-tokens", type=int, help="most tokens to draw (default: what fits the context)")
    generate.add_argument("--temperature", type=float, help="0 takes the most likely token (default: 1)")
    generate.add_argument("--top-p", type=float, help="nucleus, in (0, 1] (default: 1)")
    generate.add_argument("--top-k", type=int, help="only so many likeliest tokens (default: all)")
    generate.add_argument("--seed", type=int, help="for the same tokens again (default: random)")
    generate.add_argument("--stop", action="append", help="text that ends the completion; may be repeated")
    form = generate.add_mutually_exclusive_group()
    form.add_argument("--json-schema", type=pathlib.Path, help="file with the JSON schema that the completion must fit")
    form.add_argument("--regex", help="expression that the completion must match")
    form.add_argument("--choice", action="append", help="text that the completion may be; to be repeated")
    generate.add_argument("--timeout", type=float, help="seconds that an attempt of the request may take")
    generate.set_defaults(run=_generate)

    verify = commands.add_parser("verify", help="compare a checkpoint's logits and tokens with a golden set")
    verify.add_argument("--checkpoint", type=pathlib.Path, required=True, help="directory with ckpt-0/")
    verify.add_argument("--golden", type=pathlib.Path, required=True, help="directory of the golden set")
    verify.add_argument("--mesh", default="1x1", metavar="DATAxMODEL", help="device mesh (default: %(default)s)")
    verify.add_argument(
        "--rules", choices=RULES, default="tensor", help="how the model lies on it (default: %(default)s)"
    )
    verify.add_argument("--weights", choices=WEIGHTS, default="int8", help="as kept on devices (default: %(default)s)")
    verify.add_argument("--activations", choices=ACTIVATIONS, default="float32", help="type (default: %(default)s)")
    verify.add_argument("--hosts", type=int, default=1, help="processes that form the mesh (default: %(default)s)")
    verify.set_defaults(run=_verify)

    plan = commands.add_parser("plan", help="say whether a model fits hardware, how fast, and on which mesh")
    capacity.add_arguments(plan, WEIGHTS, KV_CACHES)
    plan.set_defaults(run=capacity.run)

    inspect = commands.add_parser("inspect", help="list a checkpoint's tensors and its configuration")
    inspect.add_argument("directory", help="directory with ckpt-0/, or its URL in an object store")
    inspect.add_argument(
        "--digest",
        metavar="DATAxMODEL",
        help="read all, and record beside it the digests of what the devices of such a mesh hold; hosts compare with them",
    )
    inspect.add_argument(
        "--rules", choices=RULES, default="tensor", help="how the model lies on that mesh (default: %(default)s)"
    )
    inspect.set_defaults(run=_inspect)

    convert = commands.add_parser("convert", help="write a checkpoint in another format")
    convert.add_argument("directory", type=pathlib.Path, help="directory with ckpt-0/")
    convert.add_argument("target", type=pathlib.Path, help="file to write")
    convert.add_argument("--to", choices=("gguf",), required=True, help="format: gguf is llama.cpp's")
    convert.add_argument("--type", choices=("q8_0", "f32"), default="q8_0", help="of matrices (default: %(default)s)")
    convert.set_defaults(run=_convert)

    bench = commands.add_parser("bench", help="measure a running service, or the engine alone")
    kinds = bench.add_subparsers(required=True, metavar="KIND")
    _bench_serve_options(kinds.add_parser("serve", help="send a load and report latencies, throughput and goodput"))
    engine = kinds.add_parser("engine", help="steps of the engine as shares of what this machine can do")
    engine.add_argument(
        "--checkpoint", type=pathlib.Path, required=True, help="directory; a random model if it is empty"
    )
    engine.add_argument("--weights", choices=WEIGHTS, default="int8", help="as kept on devices (default: %(default)s)")
    engine.add_argument("--kv-cache", choices=ACTIVATIONS, default="bfloat16", help="type (default: %(default)s)")
    engine.add_argument("--devices", type=int, default=1, help="devices of the mesh (default: %(default)s)")
    engine.add_argument(
        "--context", type=int, default=8000, help="positions of the long case; 0: none (default: %(default)s)"
    )
    engine.add_argument("--output", type=pathlib.Path, help="JSON file to write")
    engine.set_defaults(run=_bench_engine)

    status = commands.add_parser("status", help="show replicas, hosts and load of a running service")
    _address(status)
    status.set_defaults(run=_status)

    profile = commands.add_parser("profile", help="trace steps on all hosts of a replica with JAX's profiler")
    _address(profile)
    profile.add_argument("--replica", type=int, default=0, help="number of the replica (default: %(default)s)")
    profile.add_argument("--steps", type=int, default=20, help="steps to trace (default: %(default)s)")
    profile.add_argument("--timeout", type=float, default=60, help="seconds that they may take (default: %(default)s)")
    profile.add_argument("--output", type=pathlib.Path, default=pathlib.Path("profile"), help="folder for the traces")
    profile.set_defaults(run=_profile)

    key = commands.add_parser("key", help="make an API key")
    key.add_argument("name", help="of its owner, as metrics and logs show it")
    key.set_defaults(run=_key)

    health = commands.add_parser("health", help="say whether the service serves; exit code 1 if it does not")
    _address(health)
    health.set_defaults(run=_health)

    restart = commands.add_parser("restart", help="give replicas new worker processes, one after the other")
    _address(restart)
    restart.add_argument("--replica", type=int, help="only this one (default: all)")
    restart.set_defaults(run=_restart)

    stop = commands.add_parser("stop", help="drain and end the service that runs on this machine")
    _address(stop)
    stop.set_defaults(run=_stop)
    return parser


def _bench_serve_options(parser: argparse.ArgumentParser) -> None:
    _address(parser)
    parser.add_argument("--requests", type=int, default=200, help="in all (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=16, help="requests at once, at most (default: %(default)s)")
    parser.add_argument("--rate", type=float, help="arrivals a second, a Poisson process (default: a closed loop)")
    parser.add_argument("--ramp", type=float, default=0.0, help="seconds until all clients, or the rate, are reached")
    parser.add_argument("--prompt", default="128", help="tokens, or least and greatest: 64:256 (default: %(default)s)")
    parser.add_argument("--completion", default="64", help="tokens, likewise (default: %(default)s)")
    parser.add_argument(
        "--shared-prefix", type=int, default=0, help="tokens that all prompts begin with (default: none)"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="of the draws (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of lengths, prompts and arrivals (default: %(default)s)")
    parser.add_argument(
        "--slo-first-token", type=float, default=1.0, help="seconds, for goodput (default: %(default)s)"
    )
    parser.add_argument(
        "--slo-token", type=float, default=0.2, help="seconds a token, for goodput (default: %(default)s)"
    )
    parser.add_argument("--output", type=pathlib.Path, help="folder for bench.json and bench.png")
    parser.set_defaults(run=_bench_serve)


def _address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", default=DEFAULT_ADDRESS, help="of the gateway (default: %(default)s)")
    parser.add_argument(
        "--tls-ca", type=pathlib.Path, help="PEM file of who signed its certificate; then TLS is spoken"
    )
    parser.add_argument(
        "--tls-certificate", type=pathlib.Path, help="PEM file of your own certificate, if it wants one"
    )
    parser.add_argument("--tls-key", type=pathlib.Path, help="PEM file of its key")


def _access(arguments: argparse.Namespace) -> dict[str, Any]:
    """How a client gets access, as Client takes it: with the key of the environment, or one's own service's."""
    files = (arguments.tls_ca, arguments.tls_certificate, arguments.tls_key)
    key = os.environ.get(API_KEY_VARIABLE) or daemon.admin_key(arguments.address)
    return {"api_key": key, "tls": Tls(*files) if any(files) else None}


def _client(arguments: argparse.Namespace, **options: Any) -> Client:
    return Client(arguments.address, **_access(arguments), **options)


def _serve(arguments: argparse.Namespace) -> int:
    path: pathlib.Path = arguments.config
    config = load_config(path)
    if arguments.detach:
        log = daemon.start(config, path, arguments.timeout, replace=arguments.replace)
        print(f"running in the background; its log is {log}, `grokmesh stop` ends it")
        return 0
    if config.cluster.address == "local":
        prepare_environment()
    from cluster.service import serve  # Ray takes a second to import, and reads its environment then.

    logs.configure()
    serve(config, path, replace=arguments.replace)
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    names = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "regex", "choice")
    options: Options = {name: value for name in names if (value := getattr(arguments, name)) is not None}  # type: ignore[assignment]
    if arguments.json_schema:
        try:
            options["json_schema"] = arguments.json_schema.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            print(f"grokmesh: {arguments.json_schema}: {error}; JSON is UTF-8", file=sys.stderr)
            return 2
    try:
        completion_request(arguments.prompt, **options)
    except ValueError as error:  # a number that its field can't hold
        print(f"grokmesh: {error}", file=sys.stderr)
        return 2
    with _client(arguments) as client:
        began = time.monotonic()
        first, tokens, seed = 0.0, 0, 0
        for part in client.generate(arguments.prompt, timeout=arguments.timeout, **options):
            first = first or time.monotonic() - began
            tokens += len(part.tokens)
            seed = part.seed
            print(part.text, end="", flush=True)
            if part.finish_reason:
                print()
                rate = (tokens - 1) / max(time.monotonic() - began - first, 1e-9)
                print(
                    f"[{part.finish_reason}] {part.prompt_tokens} prompt tokens, {tokens} tokens at {rate:.1f} tokens/s, "
                    f"first after {first * 1000:.0f} ms, seed {seed}",
                    file=sys.stderr,
                )
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    # JAX stays out of this process: the control plane never imports it.
    command = [sys.executable, "-P", "-m", "tools.verify.verify"]
    for name in ("checkpoint", "golden", "mesh", "hosts", "rules", "weights", "activations"):
        command += [f"--{name}", str(getattr(arguments, name))]
    return subprocess.run(command, check=False).returncode


def _inspect(arguments: argparse.Namespace) -> int:
    from workers.checkpoint.checkpoint import open_checkpoint
    from workers.checkpoint.digests import FILE, record
    from workers.checkpoint.inspection import describe
    from workers.model.layout import Layout

    if not arguments.digest:
        print(describe(locate(arguments.directory)))
        return 0
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", arguments.digest)
    directory = pathlib.Path(arguments.directory)
    if found is None or not directory.is_dir():
        problem = "is no DATAxMODEL, such as 1x8" if found is None else f"needs a directory; {directory} is none"
        print(f"grokmesh: --digest {arguments.digest}: {problem}", file=sys.stderr)
        return 2
    checkpoint = open_checkpoint(directory)
    sizes = {"data": int(found[1]), "model": int(found[2])}
    count = record(checkpoint, directory, Layout.of(checkpoint.config, sizes, arguments.rules))
    print(f"{directory / FILE}: digests of {count} parts")
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from tools.gguf_export import export_gguf
    from workers.checkpoint.checkpoint import open_checkpoint

    export_gguf(open_checkpoint(arguments.directory), arguments.target, arguments.type)
    print(f"{arguments.target}: {arguments.target.stat().st_size:,} bytes")
    return 0


def _bench_serve(arguments: argparse.Namespace) -> int:
    from tools.bench.service_load import Lengths, Load, run_load
    from tools.bench.service_report import Objective, plot, summarize, table

    try:
        prompt, completion = Lengths.parse(arguments.prompt), Lengths.parse(arguments.completion)
    except ValueError as error:
        print(f"grokmesh: {error}", file=sys.stderr)
        return 2
    load = Load(
        arguments.requests, arguments.clients, arguments.rate, arguments.ramp, prompt, completion,
        arguments.shared_prefix, arguments.temperature, arguments.seed,
    )  # fmt: skip
    samples = asyncio.run(run_load(arguments.address, load, **_access(arguments)))
    summary = summarize(samples, Objective(arguments.slo_first_token, arguments.slo_token))
    print(table(summary))
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        shown = {"load": dataclasses.asdict(load), "summary": summary}
        (arguments.output / "bench.json").write_text(json.dumps(shown, indent=1))
        try:
            plot(samples, arguments.output / "bench.png")
        except ImportError as error:
            print(f"no picture: {error}; pip install 'grokmesh[bench]' brings matplotlib", file=sys.stderr)
    return 1 if summary["errors"] else 0


def _bench_engine(arguments: argparse.Namespace) -> int:
    command = [sys.executable, "-P", "-m", "tools.bench.engine"]
    for name in ("checkpoint", "weights", "kv_cache", "devices", "context", "output"):
        if (value := getattr(arguments, name)) is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    return subprocess.run(command, check=False).returncode


def _status(arguments: argparse.Namespace) -> int:
    with _client(arguments, attempts=1) as client:
        print(format_status(client.status(timeout=5)))
    return 0


def _restart(arguments: argparse.Namespace) -> int:
    with _client(arguments) as client:
        chosen = [replica.index for replica in client.status().replicas]
        for index in chosen if arguments.replica is None else [arguments.replica]:
            print(f"replica {index}: ready in epoch {client.restart(index)}", flush=True)
    return 0


def _health(arguments: argparse.Namespace) -> int:
    with _client(arguments, attempts=1) as client:
        serving = client.serving(timeout=5)
    print("serving" if serving else "not serving")
    return 0 if serving else 1


def format_status(status: cluster_pb2.GetStatusResponse) -> str:
    """The status as lines for an operator."""
    lines = [
        f"model {status.model}, version {status.version}, {status.requests} requests in the gateway, "
        f"{status.wanted_replicas} replicas wanted, metrics at {status.metrics_url}"
    ]
    for replica in status.replicas:
        state = cluster_pb2.ReplicaState.Name(replica.state).removeprefix("REPLICA_STATE_").lower()
        lines.append(
            f"replica {replica.index}: {state}, epoch {replica.epoch}, mesh {replica.mesh_data} x {replica.mesh_model}, "
            f"{replica.running} running of {replica.slots} slots, {replica.waiting} waiting, "
            f"{replica.pages_used} of {replica.pages_total} KV pages, {replica.compilations} compilations since warm-up"
        )
        if replica.last_failure:
            in_a_row = f" ({replica.failures} in a row)" if replica.failures > 1 else ""
            lines.append(f"  last failure{in_a_row}: {replica.last_failure}")
        for host in replica.hosts:
            read = f"read {host.bytes_read:,} bytes"
            if host.bytes_per_second:
                read = describe_loading(host.bytes_read, host.bytes_total, host.bytes_per_second)
            lines.append(
                f"  host {host.rank}: {host.address} pid {host.pid}, {host.devices} devices, {host.phase}, "
                f"{read}, metrics at {host.metrics_url}"
            )
    return "\n".join(lines)


def _profile(arguments: argparse.Namespace) -> int:
    folder: pathlib.Path = arguments.output / "plugins" / "profile" / time.strftime("%Y_%m_%d_%H_%M_%S")
    with _client(arguments, attempts=1) as client:
        files = client.profile(arguments.replica, arguments.steps, timeout=arguments.timeout)
    for rank, path, content in files:
        # A run's files lie beside each other, named by host; XProf shows the hosts of a run together. Many steps are several
        # runs, which the workers number.
        ending = path.name.removeprefix(path.name.split(".")[0])
        number = path.parent.name.rpartition("_")[2]
        run = folder if number == "0000" else folder.with_name(f"{folder.name}_{number}")
        run.mkdir(parents=True, exist_ok=True)
        (run / f"host-{rank}{ending}").write_bytes(content)
    print(f"{len(files)} files in {folder}")
    print(f"xprof --logdir {arguments.output} shows them; ui.perfetto.dev opens the .trace.json.gz files")
    return 0


def _key(arguments: argparse.Namespace) -> int:
    key, line = new_key(arguments.name)
    print(f"the key, which is not kept anywhere: {key}", file=sys.stderr)
    print("the line for the file that gateway.api_keys names:", file=sys.stderr)
    print(line)
    return 0


def _stop(arguments: argparse.Namespace) -> int:
    daemon.stop(arguments.address)
    print(f"the service at {arguments.address} has ended")
    return 0


if __name__ == "__main__":
    sys.exit(main())
