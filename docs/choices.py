"""Which method in which situation: for choose.md, its picture, and README.

`python docs/choices.py` prints README's table.
"""

from typing import NamedTuple

from evidence import render


class Effect(NamedTuple):
    """A difference that was measured at equal gradients, in percentage points."""

    label: str
    benchmark: str
    method: str
    baseline: str
    measure: str
    sign: int = 1  # -1 where less is better


class Situation(NamedTuple):
    """A line of the table.

    `outer` in `take` is the optimizer that one has. `measured` is a template, see
    evidence.py, whose links start at docs/.
    """

    you: str
    take: str
    gradients: str  # per update
    page: str
    measured: str
    effects: tuple[Effect, ...] = ()
    readme: bool = True


def labels(percent, method, moment="end"):
    """The effects on two data sets with a part of the labels wrong."""
    when = {"end": "", "best": ", stopped early"}[moment]
    return tuple(
        Effect(
            f"{percent} % wrong labels, {name}: {method}{when}",
            "label_noise",
            f"{data}-{percent}/{method}",
            f"{data}-{percent}/sgd",
            f"{moment}_accuracy",
        )
        for name, data in (
            ("Fashion-MNIST", "fashion_mnist"),
            ("CIFAR-10", "cifar10_small"),
        )
    )


LABELS = '{% set r = results("label_noise") %}'


def both(percent, method, moment="end"):
    """The two gains in words."""
    first, second = (
        f'{{{{ r.ahead("{e.method}", "{e.baseline}", "{e.measure}") }}}}'
        for e in labels(percent, method, moment)
    )
    return (
        f"{LABELS}[{first} points over SGD on Fashion-MNIST, {second} on CIFAR-10]"
        "(results/label_noise.md)"
    )


SITUATIONS = (
    Situation(
        "good labels, best test accuracy",
        "optax_flat.sam(outer, rho=0.05)",
        "2",
        "methods/sam.md",
        "little or nothing at equal gradients: " + both(0, "sam"),
        labels(0, "sam"),
    ),
    Situation(
        "some labels are wrong",
        "optax_flat.gsam(outer, rho=0.05, alpha=0.2)",
        "2",
        "methods/sam.md",
        "with 40 % wrong labels and no weight decay "
        + both(40, "gsam")
        + '; with an MLP SAM [{{ results("noisy_labels").ahead("mlp-40/sam", '
        '"mlp-40/sgd", "accuracy") }} over SGD whose weight decay is tuned]'
        "(results/noisy_labels.md): tune that first",
        labels(40, "gsam"),
    ),
    Situation(
        "wrong labels, one gradient per update",
        "optax_flat.ivon(0.1, ess=50_000, key=0)",
        "1",
        "methods/posteriors.md",
        "with 40 % wrong labels and no weight decay " + both(40, "ivon"),
        labels(40, "ivon"),
    ),
    Situation(
        "the training must stay as it is",
        "optax_flat.ema_weights(outer, decay=0.999)",
        "1",
        "methods/averaging.md",
        "with 40 % wrong labels and no weight decay, stopped at the best moment, "
        + both(40, "ema", "best"),
        labels(40, "ema", "best"),
    ),
    Situation(
        "wide minima by a walk, with any loop",
        'optax_flat.entropy_sgd(1.0, num_steps=20, mode="transparent", key=0)',
        "20, one per call",
        "methods/local_entropy.md",
        "parity more often than not: with good labels " + both(0, "entropy_sgd"),
        labels(0, "entropy_sgd"),
    ),
    Situation(
        "error bars on predictions",
        "optax_flat.ivon(0.1, ess=50_000, key=0)",
        "1",
        "methods/posteriors.md",
        '{% set r = results("uncertainty") %}{% set e = "ece" %}'
        "calibration error [{{ r.value('mlp/ivon', e, '.1f') }} against AdamW's "
        "{{ r.value('mlp/adamw', e, '.1f') }}, and "
        "{{ r.value('mlp/sgd_tempered', e, '.1f') }} of SGD with a fitted temperature]"
        "(results/uncertainty.md): fit that first",
    ),
    Situation(
        "the model has no gradient",
        "optax_flat.perturbation_gradient(outer, ensemble_size=64, spread=0.01, key=0)",
        "0",
        "methods/ensemble_kalman.md",
        '{% set r = results("mnist_ensemble") %}'
        '{% set m = "accuracy_percent" %}'
        '[{{ r.value("adam_perturbation_components", m, ".1f") }} % on MNIST by '
        'forward passes alone, {{ r.value("adam", m, ".1f") }} % with gradients]'
        "(results/mnist_ensemble.md)",
    ),
    Situation(
        "little memory",
        "optax_flat.coolmomentum(0.01, optax_flat.schedules."
        "exponential_cooling(0.99, total_steps=1000))",
        "1",
        "methods/coolmomentum.md",
        '{% set r = results("memory") %}'
        'its peak is [{{ r.value("coolmomentum", "peak") }} times the params, '
        'that of Adam {{ r.value("adam", "peak") }}, of Entropy-SGD '
        '{{ r.value("entropy_sgd", "peak") }}]'
        "(results/memory.md)",
        readme=False,
    ),
    Situation(
        "many devices, slow links",
        'optax_flat.parle(0.1, num_steps=20, axis_name="replicas", key=0)',
        "20 each",
        "methods/parle.md",
        '{% set s = results("scaling") %}{% set m = results("mnist_parle") %}'
        '[{{ s.ratio("sgd/weak/8", "parle/weak/8", "mib_communicated") }} times fewer '
        "bytes sent than SGD](results/scaling.md), "
        '[{{ m.value("parle", "error_percent", ".2f") }} % error on MNIST with three '
        'replicas, one SGD {{ m.value("sgd", "error_percent", ".2f") }} %]'
        "(results/mnist_parle.md)",
    ),
    Situation(
        "bfloat16 params",
        "optax_flat.master_weights(outer)",
        "those of outer",
        "mixed_precision.md",
        "exactness is tested, no benchmark: [which way](mixed_precision.md#which-way)",
        readme=False,
    ),
    Situation(
        "weights are rounded or pruned later",
        "optax_flat.swa(outer, start=1000)",
        "1",
        "methods/averaging.md",
        "level with the better one of SGD and AdamW, as is no method above it: "
        "[by severity](results/quantize_later.md)",
        readme=False,
    ),
)


def table(*, readme: bool = False) -> str:
    """A Markdown table, in README shorter and with links that start at the root."""
    lines = ["| you | take: gradients per update | what we measured |", "|---|---|---|"]
    for s in SITUATIONS:
        if s.readme or not readme:
            measured = render(s.measured)
            name = s.take.removeprefix("optax_flat.").partition("(")[0]
            line = f"| {s.you} | [`{name}`]({s.page}): {s.gradients} | {measured} |"
            lines.append(line.replace("](", "](docs/") if readme else line)
    return "\n".join(lines) + "\n"


def calls() -> str:
    """What to take, as code."""
    takes = dict.fromkeys(s.take for s in SITUATIONS)
    return "\n".join(["```python", *(f"tx = {take}" for take in takes), "```"])


if __name__ == "__main__":
    print(table(readme=True))
