"""What the scripts of situations share: equal tuning, runs, differences, summary.

A situation has cells, each a model with data in which methods are compared. In every
cell each method is tuned with seeds that are not used again, by validation data:

* The first try has the method's rate and its middle second setting (see methods.py).
  Every further one is a neighbour of the best so far that was not tried: a rate three
  times or a third as large, the second setting above or below, a rate between.
* That makes `TRIES` tries for every method. If the best rate is then at an edge, with
  no larger or no smaller one tried beside it, the missing ones are tried, `EXTRA` at
  most, so that no chosen rate is an edge of what was tried; a table says if it is.

The baseline of a cell is sgd or adamw, whichever is better after tuning, by validation.
Then all methods run with the seeds 0, 1, ...; with the same seed they have the same
start and the same data. A difference from the baseline is paired by seed; its 95 %
interval is Student's t. "better" or "worse" is an interval without 0, "same" one with
it: of twenty methods without any effect one would not be "same" by chance.

On a CPU as many runs go side by side as there are cores, so seconds are those of a
machine that is busy. A script that was cut off goes on when it is started again.
"""

import argparse
import functools
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import scipy.stats
from tqdm.auto import tqdm

import optax_flat
from benchmarks.harness import (
    COLOURS,
    SELECTION_SEED,
    Row,
    Rows,
    add_paths,
    parser,
    shuffled,
    write_json,
    write_table,
)
from benchmarks.images import Images
from benchmarks.methods import AXIS, CATALOGUES, Method, Setup
from benchmarks.models import Model
from optax_flat.training import make_train_step

BASELINES = ("sgd", "adamw")
SCALED = "_scaled"  # behind a method's name: not tuned, see `Cell.scaled_from`
TRIES = 7
EXTRA = 4
FAR = 4  # times the upper quartile of a panel: no further is drawn
STEP = 3**0.5  # between neighbouring rates of the finest grid
MOVES = ((2, 0), (-2, 0), (0, 1), (0, -1), (1, 0), (-1, 0))  # of rate and second


class Task(NamedTuple):
    """A model and its loss.

    `batch` takes the examples of given numbers out of the training data.
    """

    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, Any], jax.Array]  # of params and a minibatch
    measure: Callable[[Any, Any], dict[str, jax.Array]]  # of params and data
    batch: Callable[[Any, jax.Array], Any]


class Data(NamedTuple):
    """What the runs of one seed are given; only `train` is seen by the training."""

    train: Any
    validation: Any
    test: Any


class Trained(NamedTuple):
    """The end of a run."""

    params: Any  # to evaluate
    last: Any  # where the optimizer left them
    opt_state: Any
    points: Any  # those to evaluate at equally spaced moments, stacked


class Cell(NamedTuple):
    """Where methods are compared."""

    name: str
    task: Task
    data: Callable[[int], Data]  # of a seed
    examples: int  # of the training data, the first ones
    gradients: int
    batch: int
    base: str = "sgd"  # the catalogue
    others: Mapping[str, Method] = {}  # methods beside those of the catalogue
    tuned_by: str = "accuracy"  # a measure of the task, on the validation data
    measures: Mapping[str, int] = {"accuracy": 1}  # reported; 1 or -1, if less is more
    # Of a method's name, a run, and "validation" or "test"; None: as the task measures.
    evaluate: Callable[[str, Trained, Data, str], Row] | None = None
    report: Callable[[Trained, Data], Row] | None = None  # None: `evaluate`, of test
    draws: int = 1  # of seeds to tune with
    points: int = 1
    ess: int | None = None  # None: the number of examples
    scaled_from: tuple[str, float] = ("", 1.0)  # whose settings, and the rate's factor

    def method(self, name: str) -> Method:
        """The method around the base."""
        name = name.removesuffix(SCALED)
        return {**CATALOGUES[self.base], **self.others}[name]


def image_task(model: Model) -> Task:
    """Classification of (images, labels): loss and accuracy in percent."""

    def loss(params, batch):
        logits = model.apply(params, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    def measure(params, data):
        def right(example):
            return model.apply(params, example[0][None])[0].argmax() == example[1]

        found = jax.lax.map(right, data, batch_size=100)  # pieces that fit into a cache
        return {"accuracy": 100.0 * found.mean()}

    def batch(data, index):
        return jax.tree.map(lambda x: x[index], data)

    return Task(model.init, loss, measure, batch)


def image_data(images: Images, train: Any, validation: Any) -> Data:
    """Training images of these numbers, or slices, to train with and to tune by."""
    pixels, labels = images.train_images, images.train_labels
    return Data(
        (pixels[train], labels[train]),
        (pixels[validation], labels[validation]),
        (images.test_images, images.test_labels),
    )


def random_split(images: Images, train: int, validation: int, seed: int) -> Data:
    """Every seed has other images to train with and to tune by."""
    order = np.random.default_rng(seed).permutation(len(images.train_images))
    return image_data(images, *np.split(order[: train + validation], [train]))


# --- training -------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("task", "method"))
def train(params, data, order, setup, *, task: Task, method: Method) -> Trained:
    """One update for each entry behind the first two axes of `order`.

    The settings are arguments, so that one program serves all rates and seeds.
    """
    peak, second, ess, key = setup
    updates = order.shape[0] * order.shape[1]
    tx = method.make(Setup(peak, second, updates, ess, key))
    step: Any = make_train_step(task.loss, tx)
    init, seen = tx.init, optax_flat.eval_params
    if method.members > 1:
        step, init, seen = jax.vmap(step), jax.vmap(init), jax.vmap(seen)
    if method.replicas > 1:
        step, init = (jax.vmap(f, axis_name=AXIS) for f in (step, init))
        shape = (method.replicas,)
        params = jax.tree.map(lambda x: jnp.broadcast_to(x, shape + x.shape), params)

        def seen(opt_state, params):
            means = jax.vmap(optax_flat.eval_params)(opt_state, params)
            return jax.tree.map(lambda x: x[0], means)

    def update(state, index):
        return step(*state, task.batch(data, index))[:2], None

    def until_point(state, order):
        (params, opt_state), _ = jax.lax.scan(update, state, order)
        return (params, opt_state), seen(opt_state, params)

    state = (params, init(params))
    (last, opt_state), points = jax.lax.scan(until_point, state, order)
    return Trained(seen(opt_state, last), last, opt_state, points)


@functools.cache
def program(task: Task, method: Method, shapes: Any) -> Any:
    """`train`, compiled."""
    given = jax.tree.unflatten(*shapes)
    return train.lower(*given, task=task, method=method).compile()


@functools.cache
def measure(task: Task) -> Any:
    """`task.measure`, jitted once."""
    return jax.jit(task.measure)


def ordered(cell: Cell, method: Method, seed: int) -> np.ndarray:
    """Numbers of examples, the same for all methods: [points, updates, ..., batch].

    Between the two are the replicas and the minibatches of a walk, where there are any.
    """
    order = shuffled(cell.examples, cell.gradients * cell.batch, seed)
    order = order.reshape(-1, cell.batch)
    updates = cell.gradients // (method.num_steps * cell.points)
    walk = 1 if method.one_minibatch else method.num_steps
    order = order[: cell.points * updates * walk]
    shares = order.reshape(cell.points, updates, walk, method.replicas, -1)
    shares = shares.swapaxes(2, 3)
    replicas = shares.shape[2:3] if method.replicas > 1 else ()
    walks = (walk,) if walk > 1 else ()
    return shares.reshape(cell.points, updates, *replicas, *walks, -1)


class Candidate(NamedTuple):
    """Settings of a method: its starting rate times STEP^step, seconds[second]."""

    step: float
    second: int

    def of(self, method: Method) -> tuple[float, float]:
        """The rate and the second setting."""
        return method.start * STEP**self.step, method.seconds[self.second]

    def name(self, method: Method) -> str:
        """Part of a row's name."""
        return "{:.4g}/{:g}".format(*self.of(method))


def run(
    cell: Cell, name: str, candidate: Candidate, seed: int
) -> tuple[Trained, Data, Row]:
    """One training, and what every row says of it."""
    method = cell.method(name)
    rate, second = candidate.of(method)
    data = cell.data(seed)
    init_key, noise_key = jax.random.split(jax.random.key(seed))
    ess = cell.examples if cell.ess is None else cell.ess
    setup = (*map(jnp.float32, (rate, second, ess)), noise_key)
    order = ordered(cell, method, seed)
    params = cell.task.init(init_key)
    if method.members > 1:
        params = jax.vmap(cell.task.init)(jax.random.split(init_key, method.members))
    given = jax.device_put((params, data.train, order, setup))
    leaves, structure = jax.tree.flatten(jax.eval_shape(lambda *x: x, *given))
    compiled = program(cell.task, method, (structure, tuple(leaves)))
    start = time.perf_counter()
    trained = jax.block_until_ready(compiled(*given))
    row = {
        "cell": cell.name,
        "optimizer": name,
        "rate": rate,
        "second": second,
        "gradient_evaluations": order.shape[0] * order.shape[1] * method.num_steps,
        "forward_passes": 0,
        "seconds": time.perf_counter() - start,
    }
    return trained, data, row


def floats(measures: Mapping[str, Any]) -> dict[str, float]:
    """What a task measured."""
    return {name: float(value) for name, value in measures.items()}


def evaluated(cell: Cell, name: str, trained: Trained, data: Data, part: str) -> Row:
    """The measures of a run on "validation" or "test"."""
    if cell.evaluate is not None:
        return cell.evaluate(name, trained, data, part)
    return floats(measure(cell.task)(trained.params, getattr(data, part)))


# --- tuning ---------------------------------------------------------------------------


def has_both_sides(best: Candidate, tried: Iterable[Candidate]) -> bool:
    """Whether a smaller and a larger rate were tried with the best second setting."""
    steps = [other.step for other in tried if other.second == best.second]
    return min(steps) < best.step < max(steps)


def next_try(scores: Mapping[Candidate, float], seconds: int) -> Candidate | None:
    """What to try after these candidates with their scores; None: enough."""
    if not scores:
        return Candidate(0, seconds // 2)
    best = max(scores, key=lambda candidate: scores[candidate])
    if len(scores) >= TRIES + EXTRA:
        return None
    if len(scores) >= TRIES and has_both_sides(best, scores):
        return None
    moves = MOVES if len(scores) < TRIES else MOVES[:2]
    near = (Candidate(best.step + step, best.second + move) for step, move in moves)
    known = (c for c in near if 0 <= c.second < seconds and c not in scores)
    return next(known, None)


class Choice(NamedTuple):
    """What tuning found."""

    candidate: Candidate
    score: float  # larger is better
    tries: int
    at_edge: bool


def tune(tried: Rows, cell: Cell, name: str) -> Choice:
    """Tries candidates, each with `cell.draws` seeds; takes what is there from rows."""
    method = cell.method(name)
    known = {(row["method"], row["seed"]): row["validation"] for row in tried}

    def score(candidate, seed):
        row_name = f"{cell.name}/{name}/{candidate.name(method)}"
        if (row_name, seed) not in known:
            trained, data, row = run(cell, name, candidate, seed)
            found = evaluated(cell, name, trained, data, "validation")
            row["validation"] = found[cell.tuned_by]
            tried.record(row_name, seed, row)
            known[row_name, seed] = row["validation"]
        return cell.measures[cell.tuned_by] * known[row_name, seed]

    scores: dict[Candidate, float] = {}
    seeds = range(SELECTION_SEED, SELECTION_SEED + cell.draws)
    while candidate := next_try(scores, len(method.seconds)):
        scores[candidate] = float(np.mean([score(candidate, seed) for seed in seeds]))
    best = max(scores, key=lambda candidate: scores[candidate])
    edge = not has_both_sides(best, scores)
    return Choice(best, scores[best], len(scores), edge)


def scaled(choice: Choice, factor: float) -> Choice:
    """The settings tuned for another cell, the rate multiplied; no tries of its own."""
    step = choice.candidate.step + math.log(factor, STEP)
    return Choice(choice.candidate._replace(step=step), -math.inf, 0, at_edge=False)


# --- the whole ------------------------------------------------------------------------


def options_and_sizes(
    script: str | None,
    methods: Iterable[str],
    presets: Mapping[str, Any],
    *,
    seeds: int,
    name: str,
) -> tuple[argparse.Namespace, Any]:
    """The options of a situation, and the sizes of the preset, or of a smoke run."""
    options_of = parser(script, methods, seeds=seeds, out=f"out/{name}", data=False)
    options_of.add_argument(
        "--preset", choices=("small", "paper"), default="small", help="sizes (small)"
    )
    add_paths(options_of)
    options = options_of.parse_args()
    return options, presets["smoke" if options.smoke else options.preset]


def side_by_side(work: Callable[..., Any], items: Sequence[Any], label: str) -> list:
    """The results of all items, on a CPU one item per core at a time."""
    workers = (os.cpu_count() or 1) if jax.default_backend() == "cpu" else 1
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda item: work(*item), items)
        return list(tqdm(found, total=len(items), desc=label))


def run_missing(
    rows: Rows,
    jobs: Iterable[tuple[Cell, str]],
    candidates: Mapping[tuple[str, str], Candidate],
    seeds: int,
    label: str,
) -> None:
    """Runs each (cell, method) with the candidate of their names, for every seed."""

    def work(seed, cell, name):
        trained, data, row = run(cell, name, candidates[cell.name, name], seed)
        if cell.report is None:
            row |= evaluated(cell, name, trained, data, "test")
        else:
            row |= cell.report(trained, data)
        rows.record(f"{cell.name}/{name}", seed, row)

    runs = [(seed, *job) for seed, job in itertools.product(range(seeds), jobs)]
    missing = [r for r in runs if (f"{r[1].name}/{r[2]}", r[0]) not in rows]
    side_by_side(work, missing, label)


def compare(
    situation: str,
    cells: Sequence[Cell],
    options: argparse.Namespace,
    settings: Mapping[str, Any],
) -> dict[tuple[str, str], Choice]:
    """Tunes and runs what is missing, then writes tables, picture and summary.

    Returns what tuning chose for each (cell, method).
    """
    jobs: list[tuple[Cell, str]]
    jobs = list(itertools.product(cells, options.methods))
    tuned = [job for job in jobs if not job[1].endswith(SCALED)]
    tried = Rows(options.out / "selection", settings)
    found = side_by_side(functools.partial(tune, tried), tuned, "tuning")
    places = [(cell.name, name) for cell, name in tuned]
    choices = dict(zip(places, found, strict=True))
    write_json(
        options.out / "selection.json",
        {
            f"{cell.name}/{name}": {
                **choice._asdict(), "settings": choice.candidate.of(cell.method(name)),
            }
            for (cell, name), choice in zip(tuned, found, strict=True)
        },
    )  # fmt: skip
    for cell, name in jobs:
        if name.endswith(SCALED):
            other, factor = cell.scaled_from
            choice = choices[other, name.removesuffix(SCALED)]
            choices[cell.name, name] = scaled(choice, factor)

    rows = Rows(options.out, settings)
    candidates = {place: choice.candidate for place, choice in choices.items()}
    run_missing(rows, jobs, candidates, options.seeds, "runs")

    lines = [
        line
        for cell in cells
        for line in summary(situation, cell, options.methods, choices, rows)
    ]
    (options.out / "summary.jsonl").write_text(
        "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    )
    write_table(tables(lines, cells), options.out)
    picture(lines, options.out / f"{situation}.png")
    return choices


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """The mean with its 95 % interval, which one difference alone does not have."""
    mean, count = float(np.mean(differences)), len(differences)
    if count < 2:
        return mean, -math.inf, math.inf
    error = float(np.std(differences, ddof=1)) / count**0.5
    half = float(scipy.stats.t.ppf(0.975, count - 1)) * error
    return mean, mean - half, mean + half


def verdict(low: float, high: float) -> str:
    """Of an interval of how much better a method is."""
    return "better" if low > 0 else "worse" if high < 0 else "same"


def summary(
    situation: str,
    cell: Cell,
    methods: Sequence[str],
    choices: Mapping[tuple[str, str], Choice],
    rows: Iterable[Row],
) -> list[Row]:
    """A line for each measure and method: how much better it is than the baseline.

    Without a baseline among the methods there is nothing to compare with.
    """
    baselines = [name for name in BASELINES if name in methods]
    if not baselines:
        return []
    baseline = max(baselines, key=lambda name: choices[cell.name, name].score)
    by_method: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row["cell"] == cell.name:
            by_method.setdefault(row["optimizer"], {})[row["seed"]] = row
    lines = []
    for (name, sign), method in itertools.product(cell.measures.items(), methods):
        of, base = by_method[method], by_method[baseline]
        seeds = [seed for seed in of if seed in base]
        values = [of[seed][name] for seed in seeds]
        gains = [sign * (of[seed][name] - base[seed][name]) for seed in seeds]
        mean, low, high = interval(gains)
        finite = math.isfinite(low)
        first, choice = of[seeds[0]], choices[cell.name, method]
        lines.append({
            "situation": situation, "cell": cell.name, "measure": name,
            "method": method, "baseline": baseline, "seeds": len(seeds),
            "mean": float(np.mean(values)),
            "deviation": float(np.std(values, ddof=1)) if finite else None,
            "gain": mean,  # in the direction that is better
            "low": low if finite else None, "high": high if finite else None,
            "verdict": "baseline" if method == baseline else verdict(low, high),
            "rate": first["rate"], "second_name": cell.method(method).second,
            "second": first["second"],
            "tries": choice.tries, "at_edge": choice.at_edge,
            "gradient_evaluations": first["gradient_evaluations"],
            "seconds": float(np.mean([of[seed]["seconds"] for seed in seeds])),
        })  # fmt: skip
    return lines


def tables(lines: Sequence[Row], cells: Sequence[Cell]) -> str:
    """Markdown: for each cell and measure a line per method."""
    text = ""
    head = (
        "method", "rate", "second setting", "measure", "better by", "95 % interval",
        "verdict", "tries", "gradients", "seconds",
    )  # fmt: skip
    for cell, name in ((c, name) for c in cells for name in c.measures):
        of = [x for x in lines if (x["cell"], x["measure"]) == (cell.name, name)]
        if not of:
            continue
        text += f"### {cell.name}, {name.replace('_', ' ')} against {of[0]['baseline']}"
        text += f", {of[0]['seeds']} seeds\n\n| {' | '.join(head)} |\n"
        text += "| --- | ---: | --- |" + " ---: |" * 3 + " --- |" + " ---: |" * 3 + "\n"
        text += "".join(f"| {' | '.join(cells_of(line))} |\n" for line in of) + "\n"
    return text


def cells_of(line: Row) -> list[str]:
    """A line of the table; an edge is marked."""
    spread = "" if line["deviation"] is None else f" ± {line['deviation']:.2g}"
    bounds = "" if line["low"] is None else f"{line['low']:+.2f} to {line['high']:+.2f}"
    known = line["verdict"] != "baseline"
    return [
        line["method"],
        f"{line['rate']:.2g}" + (" (edge)" if line["at_edge"] else ""),
        f"{line['second_name']} {line['second']:g}",
        f"{line['mean']:.4g}{spread}",
        f"{line['gain']:+.2f}" if known else "",
        bounds if known else "",
        line["verdict"],
        str(line["tries"]),
        str(line["gradient_evaluations"]),
        f"{line['seconds']:.2g}",
    ]


def picture(lines: Sequence[Row], path: Path) -> None:
    """How much better than the baseline, with its interval: a panel per cell.

    What is so far away that all others would be one point is a triangle at the edge.
    """
    panels = list(dict.fromkeys((x["cell"], x["measure"]) for x in lines))
    if not panels:
        return
    columns = min(4, len(panels))
    grid_rows = -(-len(panels) // columns)
    names = list(dict.fromkeys(x["method"] for x in lines))[::-1]
    figure, grid = plt.subplots(
        grid_rows, columns, squeeze=False, layout="constrained", sharey=True,
        figsize=(2 + 2.4 * columns, grid_rows * (1 + 0.24 * max(len(names), 5))),
    )  # fmt: skip
    colours = {"better": COLOURS[2], "worse": COLOURS[1], "same": "#777777"}
    for axes, panel in itertools.zip_longest(grid.flat, panels):
        if panel is None:
            axes.set_visible(False)
            continue
        of = [x for x in lines if (x["cell"], x["measure"]) == panel]
        gains = [abs(x["gain"]) for x in of if x["verdict"] != "baseline"]
        edge = FAR * float(np.quantile(gains, 0.75)) if any(gains) else math.inf
        for x in of:
            place = names.index(x["method"])
            if x["verdict"] == "baseline":
                axes.plot(0, place, "|", color="black", markersize=10)
                continue
            colour = colours[x["verdict"]]
            if abs(x["gain"]) > edge:
                marker = "<" if x["gain"] < 0 else ">"
                axes.plot(math.copysign(edge, x["gain"]), place, marker, color=colour)
                continue
            error = None if x["low"] is None else x["high"] - x["gain"]
            axes.errorbar(
                x["gain"], place, xerr=error, fmt="o", markersize=4, capsize=2,
                color=colour,
            )  # fmt: skip
        axes.axvline(0.0, color="black", linewidth=0.8)
        low, high = axes.get_xlim()
        axes.set_xlim(max(low, -1.05 * edge), min(high, 1.05 * edge))
        axes.set_yticks(range(len(names)), [n.replace("_", " ") for n in names])
        title = f"{panel[0]}, {panel[1].replace('_', ' ')}"
        axes.set_title(f"{title}\nagainst {of[0]['baseline']}", fontsize="small")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    label = "better by, with 95 % interval; a triangle is further away"
    figure.supxlabel(label, fontsize="medium")
    figure.savefig(path, dpi=200)
    plt.close(figure)
