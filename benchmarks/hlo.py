"""What a compiled program computes and communicates, read off its text.

XLA's own cost analysis counts the body of a loop once. Here it counts as often as the
loop runs, which the text tells, and of the branches of a conditional the one that
communicates most counts.
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
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.-]+))"
)
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


def _of_computation(name: str, computations: dict[str, list[_Instruction]]) -> Costs:
    flops, collectives = 0, Counter()
    shapes = {found.name: found.shapes for found in computations[name]}
    for found in computations[name]:
        # Asynchronous ones come in two halves, of which the second has the result.
        kind = found.opcode.removesuffix("-done")
        if kind in _COLLECTIVES:
            collectives[Collective(kind, _bytes(found.shapes))] += 1
        elif found.opcode == "dot":
            flops += _flops(found, shapes)
        times, called = _called(found)
        options = [_of_computation(other, computations) for other in called]
        if options:
            most = max(options, key=lambda costs: (total_bytes(costs), costs.flops))
            flops += times * most.flops
            for collective, count in most.collectives.items():
                collectives[collective] += times * count
    return Costs(flops, collectives)


def total_bytes(costs: Costs) -> int:
    """Bytes of the results of all collectives."""
    return sum(c.bytes * times for c, times in costs.collectives.items())


def _called(found: _Instruction) -> tuple[int, list[str]]:
    """How often an instruction calls one of the computations that follow."""
    if found.opcode == "while":
        trips = _TRIPS.search(found.rest)
        if trips is None:
            raise ValueError(
                f"the loop {found.name} has no number of runs that is known when it is "
                "compiled, so its costs are unknown. Use `jax.lax.scan`."
            )
        return int(trips[1]), _BODY.findall(found.rest)
    if found.opcode == "conditional":
        listed = " ".join(a or b for a, b in _BRANCHES.findall(found.rest))
        return 1, re.findall(r"[\w.-]+", listed)
    if found.opcode in ("fusion", "call"):
        return 1, _CALLED.findall(found.rest)
    return 1, []


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
