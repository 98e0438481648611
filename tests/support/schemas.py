"""JSON schemas of the Kubernetes kinds of KubeRay and of the Prometheus operator, as far as our manifests use them.

Written by hand after the API references of KubeRay v1.7.0 (ray.io/v1 RayCluster) and prometheus-operator v0.93.0
(monitoring.coreos.com/v1 PodMonitor, v1alpha1 ScrapeConfig). They know fewer fields than the
operators do, and refuse all others.
Pods within them are checked apart, by Kubernetes' own schema.
"""

from __future__ import annotations

from typing import Any


def _object(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


_TEXT = {"type": "string", "minLength": 1}
_COUNT = {"type": "integer", "minimum": 0}
_DURATION = {"type": "string", "pattern": r"^[0-9]+(s|m|h)$"}
_STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
_QUANTITIES = {"type": "object", "additionalProperties": {"type": ["string", "integer"]}}
_TEMPLATE = _object(("spec",), spec={"type": "object"})
_METADATA = _object(("name", "namespace"), name=_TEXT, namespace=_TEXT, annotations=_STRINGS, labels=_STRINGS)
_SELECTOR = _object(("matchLabels",), matchLabels=_STRINGS)


def _kind(version: str, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    return _object(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": version},
        kind={"const": kind},
        metadata=_METADATA,
        spec=spec,
    )


RAY_CLUSTER = _kind(
    "ray.io/v1",
    "RayCluster",
    _object(
        ("headGroupSpec",),
        rayVersion=_TEXT,
        enableInTreeAutoscaling={"type": "boolean"},
        autoscalerOptions=_object(
            version={"enum": ["v1", "v2"]},
            idleTimeoutSeconds=_COUNT,
            resources=_object(requests=_QUANTITIES, limits=_QUANTITIES),
        ),
        authOptions=_object(("mode",), mode={"enum": ["disabled", "token"]}, secretName=_TEXT),
        gcsFaultToleranceOptions=_object(
            ("backend",),
            backend={"enum": ["redis", "rocksdb"]},
            storage=_object(
                size=_TEXT, storageClassName=_TEXT, deletionPolicy={"enum": ["Retain", "DeleteWithCluster"]}
            ),
        ),
        headGroupSpec=_object(("template", "rayStartParams"), template=_TEMPLATE, rayStartParams=_STRINGS),
        workerGroupSpecs=_list(
            _object(
                ("groupName", "minReplicas", "maxReplicas", "template"),
                groupName=_TEXT,
                replicas=_COUNT,
                minReplicas=_COUNT,
                maxReplicas=_COUNT,
                numOfHosts={"type": "integer", "minimum": 1},
                rayStartParams=_STRINGS,
                template=_TEMPLATE,
            )
        ),
    ),
)

POD_MONITOR = _kind(
    "monitoring.coreos.com/v1",
    "PodMonitor",
    _object(
        ("selector", "podMetricsEndpoints"),
        selector=_SELECTOR,
        podMetricsEndpoints=_list(
            _object(
                port=_TEXT,
                interval=_DURATION,
                relabelings=_list(_object(sourceLabels=_list(_TEXT), targetLabel=_TEXT)),
            )
        ),
    ),
)

SCRAPE_CONFIG = _kind(
    "monitoring.coreos.com/v1alpha1",
    "ScrapeConfig",
    _object(
        jobName=_TEXT,
        httpSDConfigs=_list(
            _object(("url",), url={"type": "string", "pattern": "^https?://"}, refreshInterval=_DURATION)
        ),
    ),
)

SCHEMAS = {"RayCluster": RAY_CLUSTER, "PodMonitor": POD_MONITOR, "ScrapeConfig": SCRAPE_CONFIG}
