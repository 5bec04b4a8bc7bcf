"""What a compiled program computes and communicates, read off its text.

XLA's own cost analysis counts the body of a loop once. Here it counts as often as the
loop runs, which the text tells, and of the branches of a conditional the one that
communicates most counts. TPUs' programs name a collective in each fusion that runs
beside it, with the same channel; it counts once.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

# As users have it, whatever JAX is set to for quick compilations.
_CPU_DEFAULTS = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
}
_EMITTERS = "xla_cpu_use_fusion_emitters"
if _EMITTERS in os.environ.get("XLA_FLAGS", ""):  # newer XLA refuses it
    _CPU_DEFAULTS[_EMITTERS] = True
_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BODY = re.compile(r"body=%?([\w.-]+)")
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_NAME = re.compile(r"%?([\w.-]+)")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.-]+))"
)
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.-]+)")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


class Collective(NamedTuple):
    """One kind of exchange between devices."""

    kind: str  # as XLA calls it: "all-reduce", "all-gather", ...
    bytes: int  # of its result, on one device


class Costs(NamedTuple):
    """What one run of a program costs each device."""

    flops: int  # of matrix products
    collectives: Counter[Collective]  # how often each is run


def compiled(jitted: Any, *args: Any) -> Any:
    """The executable of a jitted function for these arguments, fully optimized."""
    options = _CPU_DEFAULTS if jax.default_backend() == "cpu" else None
    return jitted.lower(*args).compile(compiler_options=options)


def costs(executable: Any) -> Costs:
    """Matrix products and collectives of an executable."""
    computations, entry = _parse(executable.as_text())
    return _of_computation(entry, computations)


class _Instruction(NamedTuple):
    name: str
    shapes: str
    opcode: str
    rest: str  # operands and attributes


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """The instructions of each computation, and the name of the one to begin with."""
    computations, entry, current = {}, "", []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            current.append(_Instruction(*instruction.groups()))
    return computations, entry


def _of_computation(
    name: str,
    computations: dict[str, list[_Instruction]],
    fused_in: set[str] | None = None,
) -> Costs:
    """What one run of a computation costs.

    `fused_in` are the channels that the caller has counted, if this is a fusion of it.
    """
    flops, collectives = 0, Counter()
    named = {found.name: found for found in computations[name]}
    shapes = {found.name: found.shapes for found in computations[name]}
    channels = set() if fused_in is None else fused_in
    for found in computations[name]:
        # Asynchronous ones come in two halves, of which the second has the result.
        kind = found.opcode.removesuffix("-done")
        if kind in _COLLECTIVES:
            channel = _CHANNEL.search(found.rest)
            if channel is None or channel[1] not in channels:
                collectives[_collective(kind, found.shapes, name, shapes)] += 1
            if channel is not None:
                channels.add(channel[1])
        elif found.opcode == "dot":
            flops += _flops(found, shapes)
        times, called = _called(found, named, computations)
        within = channels if found.opcode == "fusion" else None
        options = [_of_computation(other, computations, within) for other in called]
        if options:
            most = max(options, key=lambda costs: (total_bytes(costs), costs.flops))
            flops += times * most.flops
            for collective, count in most.collectives.items():
                collectives[collective] += times * count
    return Costs(flops, collectives)


def _collective(
    kind: str, result: str, computation: str, shapes: dict[str, str]
) -> Collective:
    """A collective; a reduce-scatter is a fusion of two instructions on TPUs."""
    if computation.startswith("all-reduce-scatter"):
        return Collective("reduce-scatter", _bytes(list(shapes.values())[-1]))
    return Collective(kind, _bytes(result))


def total_bytes(costs: Costs) -> int:
    """Bytes of the results of all collectives."""
    return sum(c.bytes * times for c, times in costs.collectives.items())


def _called(
    found: _Instruction,
    named: dict[str, _Instruction],
    computations: dict[str, list[_Instruction]],
) -> tuple[int, list[str]]:
    """How often an instruction calls one of the computations that follow."""
    if found.opcode == "while":
        stated = _TRIPS.search(found.rest)
        trips = int(stated[1]) if stated else _counted(found, named, computations)
        if trips is None:
            raise ValueError(
                f"the loop {found.name} has no number of runs that is known when it is "
                "compiled, so its costs are unknown. Use `jax.lax.scan`."
            )
        return trips, _BODY.findall(found.rest)
    if found.opcode == "conditional":
        listed = " ".join(a or b for a, b in _BRANCHES.findall(found.rest))
        return 1, re.findall(r"[\w.-]+", listed)
    if found.opcode in ("fusion", "call"):
        return 1, _CALLED.findall(found.rest)
    return 1, []


def _counted(
    loop: _Instruction,
    named: dict[str, _Instruction],
    computations: dict[str, list[_Instruction]],
) -> int | None:
    """The runs of a loop of `jax.lax.scan`, which counts up to a constant by ones."""

    def constant(name: str, among: dict[str, _Instruction]) -> int | None:
        while name in among and among[name].opcode in ("copy", "bitcast"):
            name = _NAME.findall(among[name].rest)[0]
        is_one = name in among and among[name].opcode == "constant"
        return int(among[name].rest.partition(")")[0]) if is_one else None

    condition = {i.name: i for i in computations[_CONDITION.findall(loop.rest)[0]]}
    *_, compared = condition.values()
    if compared.opcode != "compare" or "direction=LT" not in compared.rest:
        return None
    counter, end = _NAME.findall(compared.rest)[:2]
    start = named[_NAME.findall(loop.rest)[0]]
    if start.opcode != "tuple" or "index=0" not in condition[counter].rest:
        return None
    first = constant(_NAME.findall(start.rest)[0], named)
    last = constant(end, condition)
    return None if first is None or last is None else last - first


def largest_array(text: str) -> int:
    """Bytes of the largest array that a program makes, inside of fusions left out."""
    computations, _ = _parse(text)
    every = [found for listed in computations.values() for found in listed]
    fused = {c for i in every if i.opcode == "fusion" for c in _CALLED.findall(i.rest)}
    return max(
        size * math.prod(dims)
        for name, listed in computations.items()
        if name not in fused
        for found in listed
        for size, dims in _dimensions(found.shapes)
    )


def _dimensions(shapes: str) -> Iterator[tuple[int, list[int]]]:
    """Bytes per entry and dimensions of every array in a shape."""
    for kind, bits, listed in _SHAPE.findall(shapes):
        yield (
            1 if kind == "pred" else math.ceil(int(bits or 0) / 8),
            [int(d) for d in listed.split(",") if d],
        )


def _bytes(shapes: str) -> int:
    return sum(size * math.prod(dims) for size, dims in _dimensions(shapes))


def _flops(dot: _Instruction, shapes: dict[str, str]) -> int:
    ((_, result),) = _dimensions(dot.shapes)
    left = re.findall(r"%?([\w.-]+)", dot.rest)[0]
    ((_, dims),) = _dimensions(shapes[left])
    match = _CONTRACTED.search(dot.rest)
    contracted = [int(d) for d in match[1].split(",") if d] if match else []
    return 2 * math.prod(result) * math.prod(dims[d] for d in contracted)


def kernels(text: str) -> set[str]:
    """The different fused computations of a program: XLA compiles equal ones once."""
    bodies = re.findall(r"^%?\w*(?:fused|wrapped)[\w.-]* \(.*?^}", text, re.M | re.S)
    plain = (re.sub(r", metadata=\{[^}]*\}", "", body) for body in bodies)
    return {re.sub(r"%?[\w-]+(?:\.\w+)+|^%?\S+ ", "", body) for body in plain}
