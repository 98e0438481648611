"""Hosts, meshes, loading, and the processes themselves."""

from tools.dashboards.panels import Dashboard, Panel, Query, Row, quantiles, rate

_HOST = "replica {{replica}}, host {{rank}}"
_PROCESS = "{{component}} {{replica}} {{rank}}"


def _each(metric: str, legend: str = _HOST) -> tuple[Query, ...]:
    return (Query(f'{metric}{{model=~"$model"}}', legend),)


MESH = Dashboard(
    uid="grokmesh-mesh",
    title="Grokmesh / Cluster and mesh",
    description="Hosts of each mesh, how well they keep in step, what they hold, and how they were loaded.",
    rows=(
        Row(
            "Life",
            (
                Panel(
                    "Hosts that answer",
                    "1 for each worker that Prometheus reaches. 0: the process is gone or the network is cut; the replica is "
                    "rebuilt within seconds on another host if there is one.",
                    "short", (Query('up{component="worker", model=~"$model"}', _HOST),), warn=1, bad=0.5,
                ),
                Panel(
                    "Epoch",
                    "Number of the current mesh of each replica, as the controller and as each host knows it. A step up is a "
                    "rebuild. A host that shows less than the others is being replaced.",
                    "short",
                    (
                        *_each("grokmesh_replica_epoch", "controller, replica {{replica}}"),
                        *_each("grokmesh_worker_epoch"),
                    ),
                ),
                Panel(
                    "Rebuilds",
                    "Meshes formed again after a failure, in the last hour. More than one: find the host that keeps dying in "
                    "`grokmesh status` (last failure), and take it out.",
                    "short",
                    (
                        Query(
                            'increase(grokmesh_replica_rebuilds_total{model=~"$model"}[1h])', "replica {{replica}}"
                        ),
                    ),
                    warn=1, bad=3,
                ),
                Panel(
                    "Failures in a row",
                    "Epochs of a replica that failed one after the other without serving between. Each is tried later than the one "
                    "before; after ten the replica is given up, and tried every five minutes only.",
                    "short", _each("grokmesh_replica_failures_in_a_row", "replica {{replica}}"), warn=3, bad=10,
                ),
                Panel(
                    "Missing hosts",
                    "Hosts by which a replica's mesh is smaller than configured: they were lost, none has come instead, and "
                    "mesh.smallest lets it go on with fewer.",
                    "short", _each("grokmesh_replica_missing_hosts", "replica {{replica}}"), warn=1,
                ),
                Panel(
                    "Workers lost by host",
                    "Workers that died or did not answer, in the last hour, by the address of their host. A host that keeps losing "
                    "them is avoided while there are others; look at it before it is trusted again.",
                    "short",
                    (Query('increase(grokmesh_host_losses_total{model=~"$model"}[1h])', "{{address}}"),),
                    warn=1, bad=3,
                ),
                Panel(
                    "Completions resumed",
                    "Completions that went on elsewhere, or later, because their replica was lost. Their clients saw a pause; none "
                    "of them lost a token. Each rise should have a rebuild beside it.",
                    "short",
                    (
                        Query(
                            'increase(grokmesh_sessions_resumed_total{model=~"$model"}[1h])', "completions"
                        ),
                    ),
                ),
            ),
        ),
        Row(
            "In step",
            (
                Panel(
                    "Plans behind",
                    "Plans that the leader sent and a follower has not carried out. One or two are normal: the leader runs ahead. "
                    "Three for long: that host is stuck; more can't be, as each step waits for all hosts.",
                    "short", _each("grokmesh_mesh_plan_lag", "replica {{replica}}, host {{follower}}"), warn=2, bad=3,
                    width=6,
                ),
                Panel(
                    "Time until a follower has done a plan",
                    "From sending to the follower's word that its devices are done. It should be about a step; a host that takes "
                    "longer than the others holds all of them up.",
                    "s", quantiles("grokmesh_mesh_plan_seconds", by="follower"),
                    width=6,
                ),
                Panel(
                    "Time of a collective",
                    "The smallest all-reduce over the mesh, taken every 64 steps on every host, with the wait for the slowest "
                    "included. The host that waits least is the one that the others wait for. Growing on all: the network.",
                    "s", quantiles("grokmesh_mesh_collective_seconds", by="rank"),
                    width=6,
                ),
                Panel(
                    "Plans carried out",
                    "A second, by each host. All hosts of a replica must have the same rate; one at zero while others go on can't "
                    "be, since they wait for each other.",
                    "short", (Query(rate("grokmesh_worker_plans_total", "replica, rank"), _HOST),),
                    width=6,
                ),
            ),
        ),
        Row(
            "Loading and memory",
            (
                Panel(
                    "Speed of loading",
                    "Checkpoint bytes that a host read over the time that its last load took. Far below the disk's or the network's "
                    "speed: see whether all hosts read from one place.",
                    "Bps",
                    (
                        Query(
                            'grokmesh_worker_checkpoint_read_bytes_total{model=~"$model"} '
                            '/ (grokmesh_worker_load_seconds{model=~"$model"} > 0)',
                            _HOST,
                        ),
                    ),
                ),
                Panel(
                    "Weights from caches",
                    "What a host did not read from the checkpoint, as its own model.weights_cache had it, or that of a host which holds "
                    "the same. 0 after the first start, and where the cache is off, or was found broken.",
                    "bytes",
                    (
                        *_each("grokmesh_worker_cached_weight_bytes", f"{_HOST}, its own"),
                        *_each("grokmesh_worker_taken_weight_bytes", f"{_HOST}, another's"),
                    ),
                ),
                Panel(
                    "Memory of the devices",
                    "What a host's devices hold: parameters, KV pages, sampling state. Fixed from the start; if it does not leave "
                    "room, reduce engine.kv_pages or engine.slots.",
                    "bytes",
                    (
                        Query(
                            'sum by (replica, rank, kind) (grokmesh_worker_device_memory_bytes{model=~"$model"})',
                            "{{kind}}, " + _HOST,
                        ),
                    ),
                    "stacked",
                ),
                Panel(
                    "Memory of the processes",
                    "Resident memory. It must be flat while serving; a slope is a leak, and worth a report.",
                    "bytes", _each("process_resident_memory_bytes", _PROCESS),
                ),
            ),
        ),
        Row(
            "Processes",
            (
                Panel(
                    "Cores in use",
                    "By gateway and workers. A CPU host's worker uses all its cores while busy; the gateway at a whole core is its "
                    "limit.",
                    "short", (Query('rate(process_cpu_seconds_total{model=~"$model"}[$__rate_interval])', _PROCESS),),
                    width=6,
                ),
                Panel(
                    "Time since the start",
                    "Of each process. A worker that is younger than its gateway was replaced.",
                    "s", (Query('time() - process_start_time_seconds{model=~"$model"}', _PROCESS),),
                    width=6,
                ),
                Panel(
                    "File descriptors",
                    "Open ones, as a share of the most. Near 1 new connections fail: raise the limit (ulimit -n).",
                    "percentunit",
                    (
                        Query(
                            'process_open_fds{model=~"$model"} / process_max_fds{model=~"$model"}', _PROCESS
                        ),
                    ),
                    warn=0.7, bad=0.9,
                    width=6,
                ),
                Panel(
                    "Address space",
                    "Virtual memory of the processes, mapped checkpoints included: much more than what is resident is normal.",
                    "bytes", _each("process_virtual_memory_bytes", _PROCESS),
                    width=6,
                ),
            ),
        ),
    ),
)  # fmt: skip
