"""A capacity plan as a reader wants it: question, arithmetic, takeaway; as JSON; as configuration."""

from __future__ import annotations

from typing import Any

import yaml

from workers.capacity.hardware import CPU_SHARE, GIB
from workers.capacity.memory import VALUE_BYTES, kv_bytes_per_token, whole_bytes
from workers.capacity.planner import CHUNK, PAGE_SIZE, CapacityPlan
from workers.capacity.prediction import Range, active_parameters, expected_experts
from workers.model.config import GrokConfig
from workers.model.parameters import parameter_table

#: Bytes a second that a host reads from a good local disk, and from an object store.
DISK, OBJECT_STORE = 2e9, 1e9
#: Bytes a second that a weights cache in memory is checked with by a CPU host, and copied from it to each accelerator.
CHECKED, COPIED = 20e9, 5e9
#: Seconds until a host that has died, and one that is only silent, is known to be lost; and those that new workers take to
#: start, meet and compile from their cache: p50 and most, measured on two cores with a model of 1.27 GB.
NOTICED, REBUILT = Range(0.3, 4.0), Range(7.2, 8.8)
_PARTS = ("experts", "attention", "table", "rest", "kv_pages", "sampling", "programs")


def as_json(plan: CapacityPlan, price: float | None = None) -> dict[str, Any]:
    """All figures of a plan: bytes and seconds; with a price of a device and hour, that of tokens."""
    best = plan.best

    def seconds(found: dict[int, Range]) -> dict[str, dict[str, float]]:
        return {
            str(key): {"best": value.best, "expected": value.middle, "worst": value.worst}
            for key, value in found.items()
        }

    return {
        "hardware": str(plan.hardware),
        "devices": plan.hardware.devices,
        "parameters": sum(info.size for info in parameter_table(plan.config)),
        "mesh": {"data": best.data, "model": best.model, "rules": best.rules},
        "bytes_per_device": {part: getattr(best.memory, part) for part in _PARTS},
        "memory_per_device": plan.hardware.device.memory,
        "free_per_device": plan.free,
        "kv_bytes_per_token": kv_bytes_per_token(plan.config, plan.precision.kv_cache),
        "sequences_of_whole_context": best.capacity,
        "decode_seconds": seconds(plan.decode),
        "first_token_seconds": seconds(plan.prefill),
        "load_seconds": {
            "disk": _host_bytes(plan) / DISK,
            "object_store": _host_bytes(plan) / OBJECT_STORE,
            "weights_cache": _cached_seconds(plan),
        },
        "recovery_seconds": {"best": _recovery(plan).best, "worst": _recovery(plan).worst},
        **({} if price is None else {"price_of_a_million_tokens": _prices(plan, price)}),
        "other_meshes": [
            {"data": c.data, "model": c.model, "rules": c.rules, "sequences_of_whole_context": c.capacity}
            for c in plan.candidates[1:]
        ],
        "configuration": configuration(plan),
    }


def configuration(plan: CapacityPlan) -> dict[str, Any]:
    """The parts of `ray_config.yaml` that the plan decides."""
    hardware, best = plan.hardware, plan.best
    cluster: dict[str, Any] = {}
    if hardware.topology:
        cores = 2 if hardware.device.name in ("v4", "v5p") else 1
        pod = {"v5e": "v5litepod"}.get(hardware.device.name, hardware.device.name)
        cluster["tpu_pod_type"] = f"{pod}-{hardware.devices * cores}"
    elif hardware.device.platform == "gpu":
        cluster["accelerator"] = hardware.device.name
    else:
        cluster["memory_per_host"] = round(hardware.device.memory / CPU_SHARE / 1e9, 3)
    precision = plan.precision
    groups = plan.layout.batch_groups
    return {
        "model": {"weights": precision.weights, "activations": precision.activations, "kv_cache": precision.kv_cache},
        "cluster": cluster,
        "mesh": {
            "platform": hardware.device.platform,
            "hosts": hardware.hosts,
            "devices_per_host": hardware.devices // hardware.hosts,
            "data": best.data,
            "model": best.model,
            "rules": best.rules,
        },
        "engine": {
            "slots": best.slots,
            "page_size": PAGE_SIZE,
            "prefill_chunk": CHUNK,
            "context": plan.workload.context,
            "kv_pages": best.pages * groups,
        },
    }


def cluster_fragment(plan: CapacityPlan) -> dict[str, Any]:
    """What `deploy/cluster.yaml` needs: how many hosts of which resources a replica takes."""
    hardware = plan.hardware
    resources: dict[str, Any] = {"CPU": 4}
    if hardware.device.platform != "cpu":
        resources[hardware.device.platform.upper()] = hardware.devices // hardware.hosts
    workers = {"min_workers": hardware.hosts, "max_workers": hardware.hosts, "resources": resources}
    return {"available_node_types": {"worker": workers}}


def describe(plan: CapacityPlan, price: float | None = None) -> str:
    """The plan as a page of text; `price` is that of a device and hour."""
    return "\n".join(
        [
            *_memory_lines(plan),
            *_mesh_lines(plan),
            *_speed_lines(plan),
            *([] if price is None else _price_lines(plan, price)),
            *_load_lines(plan),
            *_configuration_lines(plan),
        ]
    )


def precision_table(plan: CapacityPlan) -> str:
    """Bytes of all parameters at each precision; Grok-1's are usually counted as 314 billion."""
    names = {"float32": "FP32", "bfloat16": "FP16", "int8": "8-bit", "int4": "4-bit"}
    counted = [("", {key: whole_bytes(plan.config, key) for key in names})]
    if plan.config == GrokConfig():
        counted.append((" (as 314 billion: ", {key: 314e9 * VALUE_BYTES[key] for key in names}))
    texts = [lead + ", ".join(f"{names[key]} {sizes[key] / 1e9:,.0f} GB" for key in names) for lead, sizes in counted]
    return "".join(texts) + (")" if len(texts) > 1 else "")


def _memory_lines(plan: CapacityPlan) -> list[str]:
    config, memory, device = plan.config, plan.best.memory, plan.hardware.device
    parameters = sum(info.size for info in parameter_table(config))
    token = kv_bytes_per_token(config, plan.precision.kv_cache)
    lines = [
        f"Does a model of {parameters / 1e9:,.2f} billion parameters fit {plan.hardware}?",
        "",
        f"  all parameters: {precision_table(plan)}",
        f"  one token meets {active_parameters(config) / 1e9:.2f} billion of them",
        f"  of each of {plan.hardware.devices} devices, {device.memory / GIB:.2f} GiB that programs can use:",
    ]
    names = {
        "table": "embedding table",
        "rest": "norms, routers",
        "kv_pages": "KV pages",
        "programs": "programs at work",
    }
    lines += [f"    {names.get(part, part):<18} {getattr(memory, part) / GIB:>8.2f} GiB" for part in _PARTS]
    lines += [
        f"    {'free':<18} {plan.free / GIB:>8.2f} GiB",
        f"  keys and values: {token / 1024:.0f} KiB a token, {token * plan.workload.context / GIB:.2f} GiB a sequence of "
        f"{plan.workload.context} in all, {plan.precision.kv_cache}",
        f"  room for {plan.best.capacity} such sequences at once; {plan.workload.concurrency} are asked for",
        "",
        "  -> "
        + (
            f"It fits, with {plan.best.capacity} sequences of {plan.workload.context} positions."
            if plan.best.capacity >= plan.workload.concurrency
            else f"It fits, but only {plan.best.capacity} sequences of the whole context at once: "
            "more will take turns, or be shorter."
        ),
        "",
    ]
    return lines


def _mesh_lines(plan: CapacityPlan) -> list[str]:
    best = plan.best
    reasons = {
        "tensor": "every weight is split over all devices, each sees every sequence; two sums of activations a layer",
        "batch": "sequences and their pages over `data`, heads over `model`, experts' width over both; "
        "attention's weights lie once in each row of `model` devices",
    }
    lines = ["Which mesh?", ""]
    for c in plan.candidates:
        chosen = "->" if c is best else "  "
        lines.append(
            f"  {chosen} data {c.data} x model {c.model}, rules {c.rules}: {c.memory.weights / GIB:.2f} GiB of weights, "
            f"{c.capacity} sequences, {c.step.best * 1e3:.1f} to {c.step.worst * 1e3:.1f} ms a step of {c.slots}"
        )
    return [*lines, "", f"  {reasons[best.rules]}.", ""]


def _speed_lines(plan: CapacityPlan) -> list[str]:
    middle = plan.workload.context // 2
    lines = [
        f"How fast? (sequences {middle} positions long; best: bytes and bandwidth; worst: with sums over devices, and less of "
        "either)",
        "",
        f"  {'batch':>7} {'experts a layer':>16} {'ms a step':>18} {'expected':>9} {'tokens/s':>20}",
    ]
    for batch, step in plan.decode.items():
        lines.append(
            f"  {batch:>7} {expected_experts(plan.config, batch):>16.1f} "
            f"{step.best * 1e3:>8.1f} .. {step.worst * 1e3:<6.1f} {step.middle * 1e3:>9.1f} "
            f"{batch / step.worst:>9,.0f} .. {batch / step.best:<8,.0f}"
        )
    for tokens, first in plan.prefill.items():
        lines.append(
            f"  first token of a prompt of {tokens}: {first.best:.2f} .. {first.worst:.2f} s, {first.middle:.2f} expected"
        )
    wanted = plan.workload.step_seconds
    if wanted is not None:
        step = plan.decode[plan.workload.concurrency]
        verdict = "met" if step.worst <= wanted else "met only if all goes well" if step.best <= wanted else "missed"
        lines.append(f"  -> {wanted * 1e3:g} ms a step for {plan.workload.concurrency} sequences: {verdict}")
    return [*lines, ""]


def _host_bytes(plan: CapacityPlan) -> float:
    """Bytes that a host reads: the release's 8 bits of its devices' parts, whatever they become."""
    stored = plan.best.memory.weights / VALUE_BYTES[plan.precision.weights]
    return stored * plan.hardware.devices / plan.hardware.hosts


def _kept_bytes(plan: CapacityPlan) -> float:
    """Bytes of a host's weights cache."""
    return plan.best.memory.weights * plan.hardware.devices / plan.hardware.hosts


def _cached_seconds(plan: CapacityPlan) -> float:
    """Seconds that a host takes to load from its weights cache in memory."""
    if plan.hardware.device.platform == "cpu":
        return _kept_bytes(plan) / CHECKED
    return plan.best.memory.weights / COPIED


def _recovery(plan: CapacityPlan) -> Range:
    """Seconds from the loss of a host until the mesh serves again with another one, which reads its part from a disk or an
    object store, while the others have theirs in a cache."""
    best, worst = (max(_host_bytes(plan) / rate, _cached_seconds(plan)) for rate in (DISK, OBJECT_STORE))
    return Range(NOTICED.best + REBUILT.best + best, NOTICED.worst + REBUILT.worst + worst)


def _prices(plan: CapacityPlan, price: float) -> dict[str, dict[str, float]]:
    """Of a million tokens that are computed without a pause: of completions by batch, of prompts by length."""
    second = price * plan.hardware.devices / 3600
    return {
        "completion": {str(batch): second * step.middle / batch * 1e6 for batch, step in plan.decode.items()},
        "prompt": {str(tokens): second * first.middle / tokens * 1e6 for tokens, first in plan.prefill.items()},
    }


def _price_lines(plan: CapacityPlan, price: float) -> list[str]:
    lines = [f"How much, at {price:g} a device and hour? (expected; a replica that always has so much to do)", ""]
    lines += [
        f"  a million tokens of {'completions, batch' if kind == 'completion' else 'prompts of'} {size}: {cost:,.2f}"
        for kind, costs in _prices(plan, price).items()
        for size, cost in costs.items()
    ]
    return [*lines, ""]


def _load_lines(plan: CapacityPlan) -> list[str]:
    size, kept, recovery = _host_bytes(plan), _kept_bytes(plan), _recovery(plan)
    themselves = ", which are the weights themselves" if plan.hardware.device.platform == "cpu" else ""
    return [
        "How long until it serves?",
        "",
        f"  each of {plan.hardware.hosts} hosts reads {size / 1e9:,.0f} GB: {size / DISK:,.0f} s from a disk of "
        f"{DISK / 1e9:g} GB/s, {size / OBJECT_STORE:,.0f} s from an object store at {OBJECT_STORE / 1e9:g} GB/s",
        f"  with model.weights_cache in memory the next start reads nothing: {_cached_seconds(plan):,.0f} s; the cache keeps "
        f"{kept / 1e9:,.0f} GB on each host{themselves}",
        f"  after the loss of a host, with another in its place and such caches: "
        f"{recovery.best:,.0f} .. {recovery.worst:,.0f} s",
        "",
    ]


def _configuration_lines(plan: CapacityPlan) -> list[str]:
    def shown(values: dict[str, Any]) -> list[str]:
        text: str = yaml.safe_dump(values, sort_keys=False)
        return [f"  {line}" for line in text.splitlines()]

    return [
        "ray_config.yaml:",
        "",
        *shown(configuration(plan)),
        "",
        "cluster.yaml:",
        "",
        *shown(cluster_fragment(plan)),
    ]
