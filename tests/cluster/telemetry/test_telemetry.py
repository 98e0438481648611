"""Small parts of what the service tells of itself."""

from __future__ import annotations

import asyncio
import json
import logging

import aiohttp

from cluster.gateway.admission.latency import WINDOW_SECONDS, RecentLatency
from cluster.telemetry.web import WebServer, targets
from grok.serving.v1 import cluster_pb2
from workers.telemetry.logs import JsonFormatter


def test_latency_is_that_of_the_last_minute() -> None:
    now = [0.0]
    latency = RecentLatency(lambda: now[0])
    assert latency.quantile(0.9) == 0
    for i in range(10):
        latency.add(i / 10)
    assert (latency.quantile(0.9), latency.quantile(0.5), latency.quantile(1.0)) == (0.9, 0.5, 0.9)
    now[0] = WINDOW_SECONDS / 2
    latency.add(0.05)
    now[0] = WINDOW_SECONDS + 1
    assert latency.quantile(0.9) == 0.05
    now[0] = 3 * WINDOW_SECONDS
    assert latency.quantile(0.9) == 0


def test_a_log_line_is_json_with_its_context_and_what_the_call_adds() -> None:
    formatter = JsonFormatter(replica=2, rank=1)
    record = logging.makeLogRecord(
        {"name": "x", "levelname": "INFO", "msg": 'said "%s"\n', "args": ("hi",), "epoch": 7}
    )
    line = formatter.format(record)
    assert "\n" not in line
    parsed = json.loads(line)
    assert (parsed["message"], parsed["level"], parsed["epoch"]) == ('said "hi"\n', "info", 7)
    assert (parsed["replica"], parsed["rank"], parsed["request_id"]) == (2, 1, None)
    assert parsed["time"].endswith("Z")


def test_a_probe_learns_whether_the_gateway_itself_reaches_a_replica() -> None:
    async def statuses() -> list[int]:
        in_reach = [1, 0]
        state = cluster_pb2.REPLICA_STATE_READY
        status = cluster_pb2.GetStatusResponse(replicas=[cluster_pb2.ReplicaStatus(state=state)])
        server = WebServer("127.0.0.1:0", lambda: status, in_reach.pop)
        url, found = f"http://127.0.0.1:{await server.start()}/ready", []
        async with aiohttp.ClientSession() as session:
            for _ in range(2):
                async with session.get(url) as response:
                    found.append(response.status)
        await server.stop()
        return found

    assert asyncio.run(statuses()) == [503, 200]


def test_prometheus_is_told_of_the_gateway_and_of_each_worker() -> None:
    hosts = [cluster_pb2.HostStatus(rank=rank, metrics_url=f"http://10.0.0.{rank}:90{rank}/metrics") for rank in (0, 1)]
    status = cluster_pb2.GetStatusResponse(model="m", replicas=[cluster_pb2.ReplicaStatus(index=3, hosts=hosts)])
    gateway, *workers = targets(status, "gateway.example:9464")
    assert gateway == {"targets": ["gateway.example:9464"], "labels": {"component": "gateway", "model": "m"}}
    assert [worker["targets"] for worker in workers] == [["10.0.0.0:900"], ["10.0.0.1:901"]]
    assert workers[1]["labels"] == {"component": "worker", "model": "m", "replica": "3", "rank": "1"}
