"""Cut off at any moment: does a run that is killed and resumed end as if it were not?

A process trains a small network, records an epoch of three updates in a `History` file
and saves params, optimizer state and position in a checkpoint, again and again. Walks
take four gradients, so that transparent ones are saved in their middle. Another process
kills it (SIGKILL) and starts it again, until it comes to its end, which must have every
bit of an undisturbed run. After every kill the History file must hold the first epochs
of the undisturbed run, none missing that was recorded, none twice.

A moment is drawn in two steps: what the process is doing (starting, updating, writing
the History, writing a checkpoint), then when; over time alone hardly one would meet
the History, which is written in a thousandth of the time. `half written` counts kills
that left a part of a checkpoint on the disk. The line `forgetful` is a control: it
does not restore the optimizer state, and this must be found.

    python -m benchmarks.faults.kills
"""

import enum
import itertools
import multiprocessing
import shutil
import signal
import statistics
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

import optax_flat
from benchmarks.checkpoint import Checkpoint, digest
from benchmarks.harness import COLOURS, COSTS, Row, Rows, parser, table, write_table
from optax_flat.training import History, make_train_step

LENGTH = 4  # gradients of a walk
EVERY = 3  # updates between checkpoints: not a divisor of LENGTH
MEMBERS = 8  # of an ensemble
MEASURES = (
    "kills",
    "before_the_first_checkpoint",
    "mid_walk",
    "starting",
    "updating",
    "writing_history",
    "writing_checkpoint",
    "half_written",
    "resumes",
    "runs",
    "bit_equal_ends",
    "history_faults",
)


class Doing(enum.IntEnum):
    """What a training process may be cut off in, and its end."""

    STARTING = 0  # reads its checkpoint and compiles
    UPDATING = 1
    WRITING_HISTORY = 2
    WRITING_CHECKPOINT = 3
    ENDED = 4


class Report(NamedTuple):
    """What a training process says when it begins something else."""

    doing: Doing
    seconds: float  # of the system's clock
    calls: int = 0  # of `update` since the run began
    recorded: int = 0  # epochs in its History
    end: str = ""  # the digest of the last state


class Method(NamedTuple):
    """An optimizer for a number of updates, and what one call of `update` takes."""

    make: Callable[[int], optax.GradientTransformation]
    batches: int = 1
    length: int = 1  # calls of an update
    gradients: int = 1  # of a call
    passes: int = 0  # of a call, beside those of its gradients
    forgetful: bool = False


class Sizes(NamedTuple):
    """How large everything is."""

    width: int = 32
    batch: int = 128
    epochs: int = 16
    images: int = 1024


SMOKE = Sizes(width=8, batch=16, epochs=3, images=64)


def _walk(factory: Callable[..., Any], mode: str, **arguments: Any) -> Method:
    def make(calls):
        return factory(0.1, num_steps=LENGTH, noise=0.01, mode=mode, key=1, **arguments)

    if mode == "scanned":
        return Method(make, batches=LENGTH, gradients=LENGTH)
    return Method(make, length=LENGTH)


def _members(factory: Callable[..., Any], *arguments: Any, **more: Any) -> Method:
    def make(calls):
        return factory(*arguments, ensemble_size=MEMBERS, spread=0.1, key=1, **more)

    return Method(make, gradients=0, passes=MEMBERS)


METHODS = {
    "entropy_sgd/scanned": _walk(optax_flat.entropy_sgd, "scanned", momentum=0.9),
    "entropy_sgd/transparent": _walk(
        optax_flat.entropy_sgd, "transparent", momentum=0.9
    ),
    "entropy_adam/scanned": _walk(optax_flat.entropy_adam, "scanned"),
    "entropy_adam/transparent": _walk(optax_flat.entropy_adam, "transparent"),
    "multipoint_nesterov/transparent": Method(
        lambda calls: optax_flat.multipoint_nesterov(
            0.02, nodes="four", mode="transparent"
        ),
        length=LENGTH,
    ),
    "coolmomentum": Method(
        lambda calls: optax_flat.coolmomentum(
            0.02, optax_flat.schedules.exponential_cooling(0.9, calls)
        )
    ),
    "sgld": Method(lambda calls: optax_flat.sgld(0.02, 1e-3, key=1)),
    "sghmc": Method(lambda calls: optax_flat.sghmc(0.02, 1e-3, key=1)),
    "ensemble_kalman": _members(optax_flat.ensemble_kalman, 0.5, momentum=0.5),
    "perturbation_gradient": _members(
        optax_flat.perturbation_gradient, optax.adam(1e-3)
    ),
    "forgetful": _walk(optax_flat.entropy_sgd, "transparent", momentum=0.9)._replace(
        forgetful=True
    ),
}


def outputs(params: Any, batch: Any) -> jax.Array:
    """Logits of an MLP."""
    hidden = jax.nn.relu(batch[0] @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def loss(logits: jax.Array, batch: Any) -> jax.Array:
    """Mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def start_params(sizes: Sizes, seed: int) -> dict[str, np.ndarray]:
    """Params of an MLP 784-width-10."""
    draw = np.random.default_rng(seed).normal
    params = {
        "w1": draw(size=(784, sizes.width)) / 28,
        "b1": np.zeros(sizes.width),
        "w2": draw(size=(sizes.width, 10)) / sizes.width**0.5,
        "b2": np.zeros(10),
    }
    return {name: np.float32(value) for name, value in params.items()}


def minibatches(method: Method, sizes: Sizes, seed: int) -> Callable[[int], Any]:
    """What call number n is given: images and labels, all random."""
    draw = np.random.default_rng((seed, 1))
    images = draw.normal(size=(sizes.images, 784)).astype(np.float32)
    labels = draw.integers(10, size=sizes.images)
    shape = (sizes.batch,) if method.batches == 1 else (method.batches, sizes.batch)

    def of_call(number):
        chosen = np.random.default_rng((seed, 2, number)).integers(
            sizes.images, size=shape
        )
        return images[chosen], labels[chosen]

    return of_call


def train(
    name: str, folder: Path, sizes: Sizes, seed: int, reports: Connection
) -> None:
    """One life of a training process: from the last checkpoint to the end, if it can.

    Params, optimizer state and position are saved together. The History is written
    before, so it may be an epoch ahead: what it has already is not recorded again.
    """
    jax.config.update("jax_compilation_cache_dir", str(folder.parent / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    method, calls = METHODS[name], EVERY * sizes.epochs
    path = folder / "history.json"
    history = History.load(path) if path.is_file() else History(path=path)

    def report(doing, end=""):
        now = time.monotonic()
        reports.send(Report(doing, now, log["calls"], len(history.loss), end))

    tx = method.make(calls)
    start = jax.jit(lambda params: (params, tx.init(params)))
    fresh = start(start_params(sizes, seed))
    with Checkpoint(folder / "checkpoint") as checkpoint, history:
        (params, opt_state), log = checkpoint.restore(fresh, {"calls": 0})
        if method.forgetful:
            opt_state = fresh[1]
        report(Doing.STARTING)
        batch = minibatches(method, sizes, seed)
        step = make_train_step(loss, tx, output_fn=outputs)
        jax.block_until_ready(step(params, opt_state, batch(0)))  # compiles
        while log["calls"] < calls:
            losses = []
            for _ in range(EVERY):
                report(Doing.UPDATING)
                given = batch(log["calls"])
                params, opt_state, value = step(params, opt_state, given)
                losses.append(float(value))
                log["calls"] += 1
            report(Doing.WRITING_HISTORY)
            if len(history.loss) < log["calls"] // EVERY:
                history.record(np.mean(losses))
            report(Doing.WRITING_CHECKPOINT)
            checkpoint.save(log["calls"], (params, opt_state), log)
        report(Doing.WRITING_HISTORY)  # once more, at its end
    report(Doing.ENDED, digest((params, opt_state)))


class Killer:
    """Starts the training processes of a method, and kills them at random moments.

    Args:
      name: the method.
      sizes: of the network and the run.
      seed: of params, data and moments.
    """

    def __init__(self, name: str, sizes: Sizes, seed: int):
        self._name, self._sizes, self._seed = name, sizes, seed
        self._draw = np.random.default_rng((seed, 3, zlib.crc32(name.encode())))
        # A server that has imported everything, and started no device yet, forks them.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            [
                "matplotlib.pyplot",
                "orbax.checkpoint",
                "optax_flat.training",
                "tqdm.auto",
            ]
        )
        # How long each thing took, in all lives so far.
        self._seconds: dict[Doing, list[float]] = defaultdict(list)

    def live(self, folder: Path, *, kill: bool) -> list[Report]:
        """Goes on with the run in the folder, until it ends or the process is dead.

        Returns:
          The reports of the process; the last one tells in what it was cut off.
        """
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=train, args=(self._name, folder, self._sizes, self._seed, theirs)
        )
        reports = [Report(Doing.STARTING, time.monotonic())]
        process.start()
        theirs.close()
        listening = _listen(ours, reports)
        if kill:
            doing, nth, fraction = self._moment()
            while sum(report.doing is doing for report in reports) < nth:
                if not next(listening, False):
                    break  # it ends before that
            delay = fraction * statistics.median(self._seconds[doing])
            process.join(max(0.0, reports[-1].seconds + delay - time.monotonic()))
            process.kill()
        for _ in listening:
            pass
        process.join()
        if process.exitcode != -signal.SIGKILL and reports[-1].doing is not Doing.ENDED:
            raise RuntimeError(
                f"{self._name}, seed {self._seed}, {folder.name}: a process that was "
                f"not killed ended with exit code {process.exitcode} while "
                f"{reports[-1].doing.name}. Its error is above."
            )
        for before, after in itertools.pairwise(reports):
            self._seconds[before.doing].append(after.seconds - before.seconds)
        return reports

    def _moment(self) -> tuple[Doing, int, float]:
        """What to cut off, the how manieth, and after which part of its usual time."""
        doing = Doing(self._draw.integers(Doing.ENDED))
        nth = 1 if doing is Doing.STARTING else int(self._draw.integers(1, 5))
        return doing, nth, self._draw.uniform()


def _listen(connection: Connection, reports: list[Report]) -> Iterator[bool]:
    """Appends the reports that come in, one at a time, until the process is dead."""
    while True:
        try:
            reports.append(connection.recv())
        except EOFError:
            return
        yield True


def is_faulty(path: Path, expected: list[float], recorded: int) -> bool:
    """Whether a History file is torn, lacks a recorded loss, or has another."""
    if not path.is_file():
        return recorded > 0
    try:
        losses = History.load(path, path=None).loss
    except ValueError:
        return True
    return losses != expected[: len(losses)] or len(losses) < recorded


def measure(name: str, folder: Path, sizes: Sizes, seed: int, kills: int) -> Row:
    """Runs, killed and resumed until there were so many kills; gives a row."""
    begin = time.perf_counter()
    method, killer = METHODS[name], Killer(name, sizes, seed)
    undisturbed = killer.live(folder / "undisturbed", kill=False)[-1]
    expected = History.load(folder / "undisturbed" / "history.json", path=None).loss
    count = Counter(dict.fromkeys(MEASURES, 0))
    while count["kills"] < kills:
        count["runs"] += 1
        run, recorded, ended = folder / f"run {count['runs']}", 0, False
        while not ended:
            reports = killer.live(run, kill=count["kills"] < kills)
            last = reports[-1]
            ended = last.doing is Doing.ENDED
            recorded = max(recorded, last.recorded)
            count["resumes"] += len(reports) > 1 and reports[1].calls > 0
            count["history_faults"] += is_faulty(
                run / "history.json", expected, recorded
            )
            if not ended:
                count["kills"] += 1
                count.update(_death(method, run / "checkpoint", last))
        count["bit_equal_ends"] += last.end == undisturbed.end
        shutil.rmtree(run)
    calls = EVERY * sizes.epochs
    return {
        "gradient_evaluations": calls * method.gradients,
        "forward_passes": calls * method.passes * sizes.batch,
        "seconds": time.perf_counter() - begin,
        **count,
    }


def _death(method: Method, folder: Path, last: Report) -> dict[str, int]:
    """What a kill met, to be counted."""
    saved = any(step.name.isdecimal() for step in folder.glob("*"))
    inside = last.calls % method.length > 0
    if method.gradients > 1:
        inside = last.doing is Doing.UPDATING
    half = any(folder.glob("*.orbax-checkpoint-tmp"))
    return {
        last.doing.name.lower(): 1,
        "before_the_first_checkpoint": not saved,
        "mid_walk": inside,
        "half_written": half and last.doing is Doing.WRITING_CHECKPOINT,
    }


def total(rows: Iterable[Row]) -> Row:
    """The sum over all methods but the control, as another row."""
    result = Counter()
    for row in rows:
        if not METHODS[row["method"]].forgetful:
            result.update({name: row[name] for name in (*MEASURES, *COSTS)})
    return {"method": "all", "seed": 0, **result}


def draw(rows: Iterable[Row], path: Path) -> None:
    """A bar per method: in what it was cut off."""
    rows = list(rows)[::-1]
    figure, axes = plt.subplots(
        figsize=(7, 1.5 + 0.3 * len(rows)), layout="constrained"
    )
    names = [f"{row['method']}, seed {row['seed']}" for row in rows]
    left = np.zeros(len(rows))
    for doing, colour in zip(list(Doing)[: Doing.ENDED], COLOURS, strict=False):
        name = doing.name.lower()
        width = np.array([row[name] for row in rows])
        axes.barh(names, width, left=left, color=colour, label=name.replace("_", " "))
        left += width
    axes.set_xlabel("Kills")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=Doing.ENDED)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def main() -> None:
    """Kills and resumes all that was asked for."""
    arguments = parser(__doc__, METHODS, seeds=1, out="out/kills", data=False)
    arguments.add_argument(
        "--kills", type=int, metavar="N", help="of every method (20; smoke: 4)"
    )
    options = arguments.parse_args()
    sizes = SMOKE if options.smoke else Sizes()
    kills = options.kills or (4 if options.smoke else 20)
    settings = {"kills": kills, "length": LENGTH, "every": EVERY, **sizes._asdict()}
    rows = Rows(options.out, settings)
    for name, seed in rows.pending(options.methods, range(options.seeds)):
        with tempfile.TemporaryDirectory() as folder:
            rows.record(name, seed, measure(name, Path(folder), sizes, seed, kills))
    write_table(table([*rows, total(rows)], MEASURES), options.out)
    draw(rows, options.out / "kills.png")


if __name__ == "__main__":
    main()
