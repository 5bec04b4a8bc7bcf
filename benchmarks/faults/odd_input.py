"""Odd params and arguments for every method: how many are refused, and how many fail.

Each row is a number of examples, made by hypothesis from one seed, for one method: an
update that is finite and of the right structure, a ValueError or TypeError of the
library, or a failure, which is anything else.

    python -m benchmarks.faults.odd_input
"""

import sys
import time
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from benchmarks import harness

sys.path.append(str(Path(__file__).parents[2] / "tests"))

import generated
from catalogue import METHODS

COLUMNS = ("examples", "refused", "finite", "failures")


def main() -> None:
    """Runs what has no row yet."""
    methods = {method.name: method for method in METHODS}
    parser = harness.parser(
        __doc__, methods, seeds=20, out="results/odd_input", data=False
    )
    options = parser.parse_args()
    examples = 3 if options.smoke else 100
    rows = harness.Rows(options.out, {"examples": examples})
    for name, number in rows.pending(options.methods, range(options.seeds)):
        rows.record(name, number, row(methods[name], number, examples))
    harness.write_table(table(rows), options.out)


def row(method, number, examples):
    """What became of some examples; descriptions of the failures."""
    found: Counter[str] = Counter()

    @seed(number)
    @settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(generated.examples(method, method.modes))
    def try_out(example):
        found[generated.outcome(method, example)] += 1

    start = time.perf_counter()
    try_out()
    failures = {
        text: n for text, n in found.items() if text not in {"finite", "refused"}
    }
    return {
        "examples": sum(found.values()),
        "refused": found["refused"],
        "finite": found["finite"],
        "failures": sum(failures.values()),
        "descriptions": list(failures),
        "gradient_evaluations": 0,
        "forward_passes": 0,
        "seconds": time.perf_counter() - start,
    }


def table(rows) -> str:
    """One line per method: sums over the seeds."""
    sums: dict[str, Counter[str]] = {}
    for one in rows:
        counts = {column: one[column] for column in COLUMNS}
        sums.setdefault(one["method"], Counter()).update(counts)
    lines = [["method", *COLUMNS], ["---"] + ["---:"] * len(COLUMNS)]
    lines += [[name, *(str(n[c]) for c in COLUMNS)] for name, n in sums.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
