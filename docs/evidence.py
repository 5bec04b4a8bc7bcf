"""What the pages say in numbers, read from the rows in results/ when the site is built.

A page under results/ is a Jinja template, and so is every page that says
`<!-- numbers -->` in its first line:

    {% set r = results("sam_time") %}
    SAM takes {{ r.value("sam", "ratio_to_pair") }} times as long.

A name of a method may be a pattern such as `mnist-clean-*/sam/*`: then each seed counts
with the mean of all rows that match.
"""

import fnmatch
import functools
import json
import statistics
from pathlib import Path

import jinja2
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
MARK = "<!-- numbers -->\n"


class Results:
    """The rows of one benchmark, results/NAME/rows.json.

    Args:
      name: of the benchmark and of its folder.
    """

    def __init__(self, name: str):
        self.name = name
        self.folder = ROOT / "results" / name
        self.rows = self._read("rows.json", [])
        self.settings = self._read("settings.json", {})

    def _read(self, name, default):
        path = self.folder / name
        return json.loads(path.read_text()) if path.is_file() else default

    @property
    def script(self) -> str:
        """What `python` is given to start it: `-m MODULE`, or an example's path."""
        folders = (ROOT / "benchmarks", ROOT / "examples")
        (path,) = [p for f in folders for p in f.rglob(f"{self.name}.py")]
        path = path.relative_to(ROOT)
        if path.parts[0] == "examples":
            return path.as_posix()
        return f"-m {'.'.join(path.with_suffix('').parts)}"

    def command(self, options: str = "") -> str:
        """The command, and what it was run on."""
        seeds = len({row["seed"] for row in self.rows})
        facts = [
            f"`python {' '.join([self.script, options]).strip()}`",
            f"{len(self.rows)} rows, {seeds} seed{'s' if seeds > 1 else ''}",
        ]
        if "jax" in self.settings:
            facts.append(f"JAX {self.settings['jax']}, {self.settings['device']}")
        return " · ".join(facts) + f" · rows: `results/{self.name}/rows.json`"

    @property
    def table(self) -> str:
        """What the script wrote: mean ± standard deviation over the seeds."""
        return self.file("table.md")

    def file(self, name: str) -> str:
        """A text that the script wrote."""
        return (self.folder / name).read_text()

    def by_seed(self, method: str, measure: str) -> dict[int, float]:
        """The measure of each seed, a mean if several methods match; a curve's end."""
        found: dict[int, list[float]] = {}
        for row in self.rows:
            if fnmatch.fnmatchcase(row["method"], method) and measure in row:
                value = row[measure]
                end = value[-1] if isinstance(value, list) else value
                found.setdefault(row["seed"], []).append(end)
        if not found:
            raise KeyError(f"results/{self.name} has no {measure} of {method}")
        return {seed: statistics.fmean(values) for seed, values in found.items()}

    def mean(self, method: str, measure: str) -> float:
        """The mean over the seeds."""
        return statistics.fmean(self.by_seed(method, measure).values())

    def value(self, method: str, measure: str, form: str = ".3g") -> str:
        """The mean over the seeds, in Python's format."""
        return format(self.mean(method, measure), form)

    def more(self, method: str, measure: str) -> str:
        """By how many percent a ratio is above 1."""
        return f"{100 * self.mean(method, measure) - 100:.0f} %"

    def ratio(self, method: str, other: str, measure: str, form: str = ".2g") -> str:
        """One method's mean over another's."""
        return format(self.mean(method, measure) / self.mean(other, measure), form)

    def gain(self, method: str, other: str, measure: str) -> tuple[float, float]:
        """How far a method is above another, paired by seed: mean, half of 95 %."""
        ours, theirs = self.by_seed(method, measure), self.by_seed(other, measure)
        gains = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
        if len(gains) < 2:
            return statistics.fmean(gains), float("nan")
        error = statistics.stdev(gains) / len(gains) ** 0.5
        return statistics.fmean(gains), stats.t.ppf(0.975, len(gains) - 1) * error

    def tau(self, kind: str, target: str, measure: str, cell: str = "all") -> str:
        """A correlation of correlations.json, which flat_study has."""
        (row,) = [
            row
            for row in self._read("correlations.json", {})[kind]
            if (row["target"], row["measure"], row["cell"]) == (target, measure, cell)
        ]
        return f"{row['tau']:.2f}"

    def ahead(
        self, method: str, other: str, measure: str, *, form: str = ".1f", sign: int = 1
    ) -> str:
        """`gain` in words, `2.0 ± 0.6`; `sign=-1` where less is better."""
        mean, half = self.gain(method, other, measure)
        # Unbroken at the end of a line.
        return f"{format(sign * mean, form)}\xa0±\xa0{format(half, form)}"


@functools.cache
def results(name: str) -> Results:
    """The rows of a benchmark, read once."""
    return Results(name)


def render(text: str, **names) -> str:
    """A page with its numbers; a name that does not exist is an error."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(text).render(results=results, **names)
