"""One host's part of the mesh: carries plans out, in order, and reads sampled tokens back."""

from __future__ import annotations

import dataclasses
import functools
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from workers.checkpoint.loader import Params
from workers.kernels.interface import Site
from workers.kernels.sampling import IN_PROMPT, TOP_IDS, TOP_LOGPROBS
from workers.messages.plan import Chunk, Draft, Plan, Sampling, Score, SlotStart, StepTokens, Token
from workers.model.partition import Partition
from workers.runtime.compilation import compile_all
from workers.runtime.program_set import ProgramSet
from workers.runtime.programs import Programs, State
from workers.runtime.slots import SlotTable, verified

Array = np.ndarray[Any, np.dtype[Any]]


@dataclasses.dataclass(frozen=True)
class Launched:
    """What the programs of a plan return, which the devices may still be computing.

    Attributes:
      prefills: packed samples of each prefill call.
      scores: packed scores of each prefill call that has any.
      decodes: packed samples of each decode call, [slots, ...] or, with drafts, [R, 1 + MAX_DRAFT, ...] in `verified` places.
      expert_counts: [L, E] of each call.
    """

    prefills: tuple[jax.Array, ...]
    scores: tuple[jax.Array, ...]
    decodes: tuple[jax.Array, ...]
    expert_counts: tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Pending:
    """A plan that was dispatched.

    Attributes:
      plan: the plan.
      launched: what comes of it, once its programs are launched.
      top_logprobs: of each slot, how many alternatives its request wants to know.
    """

    plan: Plan
    launched: Future[Launched]
    top_logprobs: tuple[int, ...]


class Runtime:
    """Owns the device state: parameters, pages, last tokens, biases. Every host of the mesh has one, fed the same plans."""

    def __init__(
        self, program_set: ProgramSet, partition: Partition, report: Callable[[float], None] = lambda _: None
    ) -> None:
        """Allocates the state and compiles all programs. Before anything is computed, `set_parameters` must be called.

        Args:
          program_set: of the engine.
          partition: that of the program_set, on devices.
          report: called with the fraction of the programs that are compiled.
        """
        mesh = partition.mesh
        assert isinstance(mesh, Mesh)
        config, shape = program_set.config, program_set.shape
        self.config = config
        self.shape = shape
        self.kernels = partition.kernels.name
        #: Whether the host's own processors are the devices.
        self.host_computes = mesh.devices.flat[0].platform == "cpu"
        #: Launches that a thread of their own carries out. One may take as long as its step, as a GPU's branches wait for the
        #: host; plans and samples must not wait with it. None where the host computes.
        self._launches: queue.SimpleQueue[tuple[Callable[[], Launched], Future[Launched]]] | None = None
        if partition.kernels.accelerator:
            self._launches = queue.SimpleQueue()
            # A daemon, as a launch may never return.
            threading.Thread(target=_carry_out, args=(self._launches,), daemon=True, name="launcher").start()
        self._partition = partition
        self._params: Params = {}
        self._state = _zeros(program_set.state, mesh)
        self._slots = SlotTable(shape)
        self._top_logprobs = [0] * shape.slots
        compiled = compile_all(
            {name: functools.partial(_compile, program_set, name, mesh) for name in program_set.names}, report
        )
        self._prefill, self._score, self._decode = compiled["prefill"], compiled["score"], compiled["decode"]
        self._verify = compiled.get("verify")
        self._set_row = {name: compiled[name] for name in vars(self._state.sampling)}
        self._logits = Programs(config, shape, partition, program_set.dtype).logits
        self._group_starts = [group.start for group in config.layer_groups()]
        axes = mesh.axis_names if mesh.size > 1 else ()
        add = partition.on_parts(lambda x: partition.sum(x, axes, Site.PROBE), PartitionSpec(), PartitionSpec())
        self._one = jax.jit(lambda: jnp.ones(1), out_shardings=partition.sharding(()))()
        self._all_reduce = jax.jit(add).lower(self._one).compile()

    def set_parameters(self, params: Params) -> None:
        """Gives the engine its parameters."""
        self._params = params

    @property
    def device_bytes(self) -> dict[str, int]:
        """Bytes that this host's devices hold, by what they are for."""
        state = self._state
        kinds = {"parameters": self._params, "kv_pages": state.pages, "sampling": (state.tokens, state.sampling)}
        return {name: _local_bytes(arrays) for name, arrays in kinds.items()}

    def probe(self) -> float:
        """Seconds of the smallest all-reduce over all devices, waiting for the slowest host included. All hosts must call
        this between the same plans, each when its devices are idle."""
        began = time.perf_counter()
        jax.block_until_ready(self._all_reduce(self._one))
        return time.perf_counter() - began

    def warm_up(self) -> None:
        """Runs every program once without effect. All hosts must have compiled before any calls this."""
        self.read(self.execute(Plan(0, (), ((),), ())))  # launched, before this thread takes the state
        self._state, _, _, _ = self._score(self._params, self._state, self._slots.score(()))
        self._state, packed, _ = self._decode(self._params, self._state, self._slots.decode(()))
        if self._verify is not None:
            self._state, packed, _ = self._verify(self._params, self._state, self._slots.verify((), ()))
        self.probe()
        for name, array in vars(self._state.sampling).items():
            self._set(name, 0, np.zeros(array.shape[1], array.dtype))
        jax.block_until_ready((packed, self._state))

    def execute(self, plan: Plan) -> Pending:
        """Dispatches a plan. Returns before the devices are done, unless the host computes: that happens in this call."""
        changes: list[tuple[str, int, Array]] = []
        for grant in plan.grants:
            self._slots.grant(grant)
        for start in plan.starts:
            self._slots.start(start)
            self._top_logprobs[start.slot] = start.sampling.top_logprobs
            if start.sampling.biased:
                changes.append(("bias", start.slot, self._bias_row(start.sampling)))
            if start.sampling.penalized:
                changes.append(("counts", start.slot, self._counts_row(start)))
        self._slots.force(plan.forced)
        for mask in plan.masks:
            changes.append(("mask", mask.slot, np.frombuffer(mask.words, np.int32)))
        calls = [
            (self._score, self._slots.score(chunks))
            if _scored(chunks)
            else (self._prefill, self._slots.prefill(chunks))
            for chunks in plan.prefills
        ]
        if plan.drafts:
            calls.append((self._verify, self._slots.verify(plan.decode, plan.drafts)))
        else:
            steps = range(plan.steps if plan.decode else 0)
            calls += [(self._decode, self._slots.decode(plan.decode, step)) for step in steps]

        def launch() -> Launched:
            for change in changes:
                self._set(*change)
            results = [self._call(*call) for call in calls]
            samples = tuple(result[0] for result in results)
            scores = tuple(result[2] for result in results if len(result) > 2)
            first = len(plan.prefills)
            return Launched(samples[:first], scores, samples[first:], tuple(result[1] for result in results))

        return Pending(plan, self._launch(launch), tuple(self._top_logprobs))

    def _launch(self, launch: Callable[[], Launched]) -> Future[Launched]:
        """All launches happen one after the other, in the order of the plans."""
        launched: Future[Launched] = Future()
        if self._launches is not None:
            self._launches.put((launch, launched))
        else:
            launched.set_result(launch())
        return launched

    def _call(self, program: Any, packed: Array) -> tuple[jax.Array, ...]:
        """Runs a program on packed rows: samples, expert counts, and scores if it has any."""
        self._state, *results = program(self._params, self._state, packed)
        return tuple(results)

    def read(self, pending: Pending) -> StepTokens:
        """Waits for a plan's samples and copies them to the host."""
        plan, top, launched = pending.plan, pending.top_logprobs, pending.launched.result()
        prefilled = []
        for chunks, packed in zip(plan.prefills, launched.prefills, strict=True):
            rows = _first(packed)
            prefilled += [_token(rows[self.shape.group_of(c.slot)], top[c.slot]) for c in chunks if c.last]
        scoring = [chunks for chunks in plan.prefills if _scored(chunks)]
        scored = []
        for chunks, packed in zip(scoring, launched.scores, strict=True):
            rows = _first(packed)
            scored += [_scores(c, rows[self.shape.group_of(c.slot)], top[c.slot]) for c in chunks if c.scored]
        steps = [_first(packed) for packed in launched.decodes]
        if plan.drafts:
            (drawn,) = steps
            places = iter(verified(self.shape, plan.decode, plan.drafts))
            decoded: tuple[tuple[Token, ...], ...] = tuple(
                (_token(drawn[next(places), 0], top[row.slot]),) for row in plan.decode
            )
            drafted = tuple(_right(draft, drawn[next(places)], top[draft.slot]) for draft in plan.drafts)
        else:
            decoded = tuple(tuple(_token(rows[row.slot], top[row.slot]) for rows in steps) for row in plan.decode)
            drafted = ()
        counts = self._expert_tokens(launched)
        return StepTokens(plan.number, tuple(prefilled), decoded, drafted, counts, tuple(scored))

    def wait(self, pending: Pending) -> None:
        """Waits until the devices have finished a plan."""
        launched = pending.launched.result()
        jax.block_until_ready((launched.prefills, launched.decodes))

    def _expert_tokens(self, launched: Launched) -> tuple[tuple[int, ...], ...]:
        counts = [_first(count) for count in launched.expert_counts]  # [L, E] each
        by_group = np.add.reduceat(np.sum(counts, axis=0), self._group_starts, axis=0)
        return tuple(map(tuple, by_group.tolist()))

    def logits(self, plan: Plan) -> tuple[Array, Array]:
        """Carries out the single chunk of a plan; logits [chunk, V] and router probabilities [chunk, L, E] of its positions.

        See `Programs._logits`. It is compiled on first use: serving never calls it.
        """
        for start in plan.starts:
            self._slots.start(start)
        ((chunk,),) = plan.prefills
        self._state, logits, probabilities = self._logits(self._params, self._state, self._slots.prefill((chunk,)))
        group, length = self.shape.group_of(chunk.slot), len(chunk.tokens)
        first = [_first(a)[group, :length] for a in (logits, probabilities)]
        return first[0], first[1]

    def _set(self, name: str, slot: int, row: Array) -> None:
        sampling = self._state.sampling
        changed = self._set_row[name](getattr(sampling, name), np.int32(slot), row)
        self._state = dataclasses.replace(self._state, sampling=dataclasses.replace(sampling, **{name: changed}))

    def _bias_row(self, sampling: Sampling) -> Array:
        row = np.zeros(self.config.vocab_size, np.float32)
        if sampling.allowed_tokens:
            row[:] = -np.inf
            row[list(sampling.allowed_tokens)] = 0.0
        for token, value in sampling.logit_bias:
            row[token] += value
        return row

    def _counts_row(self, start: SlotStart) -> Array:
        row = np.zeros(self.config.vocab_size, np.int32)
        row[list(start.prompt)] = IN_PROMPT
        np.add.at(row, list(start.generated), 1)
        return row


def _carry_out(launches: queue.SimpleQueue[tuple[Callable[[], Launched], Future[Launched]]]) -> None:
    """Launches one after the other, for ever."""
    while True:
        launch, launched = launches.get()
        try:
            launched.set_result(launch())
        except Exception as error:  # whoever reads the samples gets it, as if the devices had failed later
            launched.set_exception(error)


def _zeros(shapes: State, mesh: Mesh) -> State:
    """The state before anything has happened. Of a kind of array one program makes all."""
    made: dict[Any, Callable[[], jax.Array]] = {}

    def zeros(array: jax.ShapeDtypeStruct) -> jax.Array:
        spec = array.sharding.spec
        kind = (array.shape, array.dtype, spec)
        if kind not in made:
            made[kind] = jax.jit(lambda: jnp.zeros(array.shape, array.dtype), out_shardings=NamedSharding(mesh, spec))
        return made[kind]()

    state: State = jax.tree.map(zeros, shapes)
    return state


def _compile(program_set: ProgramSet, name: str, mesh: Mesh) -> Any:
    # On a CPU each operation takes all threads as it is; several at a time would only wait for each other.
    platform = mesh.devices.flat[0].client.platform
    options = {"xla_cpu_enable_concurrency_optimized_scheduler": False} if platform == "cpu" else None
    lowered = program_set.trace(name).lower(lowering_platforms=(platform,))
    return lowered.compile(compiler_options=options, device_assignment=tuple(mesh.devices.flat))


def _first(array: jax.Array) -> Array:
    """The host's copy of an array that lies whole on every device."""
    return np.asarray(array.addressable_data(0))


def _local_bytes(arrays: Any) -> int:
    return sum(shard.data.nbytes for array in jax.tree.leaves(arrays) for shard in array.addressable_shards)


def _right(draft: Draft, rows: Array, top: int) -> tuple[Token, ...]:
    """The tokens [1 + MAX_DRAFT, ...] that were drawn as long as the draft guessed right, and the one after them."""
    taken = 0
    while taken + 1 < len(draft.tokens) and rows[taken, 0] == draft.tokens[taken + 1]:
        taken += 1
    return tuple(_token(row, top) for row in rows[: taken + 1])


def _scored(chunks: tuple[Chunk, ...]) -> bool:
    """Whether a prefill call scores tokens."""
    return any(chunk.scored for chunk in chunks)


def _scores(chunk: Chunk, rows: Array, top: int) -> tuple[Score, ...]:
    """What became of a chunk's scored tokens, from the packed scores [chunk, ...] of its positions."""
    return tuple(
        Score(logprob, rank, alternatives)
        for rank, logprob, alternatives in (
            _unpacked(row, top) for row, token in zip(rows, chunk.scored, strict=False) if token >= 0
        )
    )


def _token(row: Array, top: int) -> Token:
    """A packed sample, with the `top` most likely alternatives."""
    return Token(*_unpacked(row, top))


def _unpacked(row: Array, top: int) -> tuple[int, float, tuple[tuple[int, float], ...]]:
    """A packed row's first number, its logarithmic probability, and the `top` most likely tokens."""
    floats = row.view(np.float32)
    ids, logprobs = row[TOP_IDS : TOP_IDS + top].tolist(), floats[TOP_LOGPROBS : TOP_LOGPROBS + top].tolist()
    return int(row[0]), float(floats[1]), tuple(zip(ids, logprobs, strict=True))
