"""make_train_step, TrainState and History."""

import csv
import json
import math
import os
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problem import assert_close, batches, loss, ragged_params, train

import optax_flat
from optax_flat.training import History, TrainState, make_train_step

MODES = ["scanned", "transparent"]


def make(mode, **arguments):
    settings = {"num_steps": 4, "noise": 0.05, "mode": mode, "key": 0}
    return optax_flat.entropy_sgd(0.5, **settings | arguments)


def feed(stack, mode):
    """What a step takes: a stack of minibatches, or one after the other."""
    return [stack] if mode == "scanned" else list(stack)


def start(tx):
    """Params and state to trace a step with, without compiling anything."""
    return ragged_params(), jax.eval_shape(tx.init, ragged_params())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("donate", [False, True])
def test_step_is_the_optimizer(mode, donate):
    tx = make(mode)
    step = make_train_step(loss, tx, donate=donate)
    params, state = ragged_params(), tx.init(ragged_params())
    data = batches(3, 4)
    for stack in data:
        for i, batch in enumerate(feed(stack, mode)):
            anchor = jax.tree.map(jnp.copy, params)
            params, state, value = step(params, state, batch)
            if i == 0:
                assert_close(value, loss(anchor, stack[0]))
    assert_close(params, train(tx, mode, ragged_params(), data).params)


@pytest.mark.parametrize(
    "tx",
    [
        optax.adam(0.1),
        optax.lbfgs(),
        optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
        optax.MultiSteps(optax.adam(0.1), 2),
        optax.MultiSteps(make("transparent"), 2),
    ],
)
def test_step_for_any_optimizer(tx):
    step = make_train_step(loss, tx)
    params, state = ragged_params(), tx.init(ragged_params())
    batch = batches(1, 1)[0, 0]
    first = loss(params, batch)
    for _ in range(30):
        params, state, _ = step(params, state, batch)
    assert loss(params, batch) < 0.9 * first


@pytest.mark.parametrize("mode", MODES)
def test_aux_moves_once_per_update_and_keys_never_repeat(mode):
    """Statistics move in the clean pass only; every pass draws with its own key."""
    seen = []

    def loss_fn(params, batch, aux):
        key, used = jax.random.split(aux["key"])
        # Two more streams count, as flax.nnx does: their keys stay and a count moves.
        stream, other = jax.vmap(jax.random.fold_in, (0, None))(
            aux["stream"], aux["count"]
        )
        for k in (used, stream, other):
            data = jax.random.key_data(k)
            jax.debug.callback(lambda d: seen.append(tuple(map(int, d))), data)
        moved = {"key": key, "stream": aux["stream"], "count": aux["count"] + 1}
        return loss(params, batch), moved

    tx = make(mode, has_aux=True)
    step = make_train_step(loss_fn, tx, has_aux=True)
    params, state = ragged_params(), tx.init(ragged_params())
    aux = {
        "key": jax.random.key(1),
        "stream": jax.random.split(jax.random.key(2)),
        "count": jnp.array(0, jnp.uint32),
    }
    for t, stack in enumerate(batches(3, 4)):
        for batch in feed(stack, mode):
            params, state, _, aux = step(params, state, batch, aux)
        assert int(aux["count"]) == t + 1
    jax.effects_barrier()
    assert len(seen) == 3 * 3 * 4
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("mode", MODES)
def test_a_lost_pass_does_not_spoil_the_statistics(mode):
    def loss_fn(params, batch, aux):
        return loss(params, batch), {"mean": 0.9 * aux["mean"] + 0.1 * batch.mean()}

    tx = make(mode, has_aux=True, skip_nonfinite=True)
    step = make_train_step(loss_fn, tx, has_aux=True)
    params, state, aux = ragged_params(), tx.init(ragged_params()), {"mean": 0.5}
    stack = batches(1, 4)[0].at[0].set(jnp.nan)
    for batch in feed(stack, mode):
        params, state, _, aux = step(params, state, batch, aux)
    assert float(aux["mean"]) == 0.5
    assert_close(params, ragged_params())


def test_aux_keeps_its_structure():
    def loss_fn(params, batch, aux):
        return loss(params, batch), {"mean": batch.mean()}

    tx = optax.sgd(0.1)
    step = make_train_step(loss_fn, tx, has_aux=True)
    arguments = ragged_params(), tx.init(ragged_params()), batches(1, 1)[0, 0]
    with pytest.raises(ValueError, match="(?s)`aux` moves along .*Pass a first `aux`"):
        step(*arguments, {"other": 0.0})
    with pytest.raises(
        ValueError, match="`aux` moves along .*None.*Pass a first `aux`"
    ):
        step(*arguments)


def test_has_aux_is_told_once():
    """An optimizer that is given `aux` threads it, whether it was told or not."""

    def loss_fn(params, batch, aux):
        return aux["scale"] * loss(params, batch), {"scale": 0.5 * aux["scale"]}

    def run(tx):
        step = make_train_step(loss_fn, tx, has_aux=True)
        params, state = ragged_params(), tx.init(ragged_params())
        params, *_, aux = step(params, state, batches(1, 4)[0], {"scale": 1.0})
        return params, aux

    told, untold = (make("scanned", has_aux=told) for told in (True, False))
    jax.tree.map(np.testing.assert_array_equal, run(told), run(untold))


def test_has_aux_forgotten_at_the_step():
    tx = make("scanned", has_aux=True)
    arguments = *start(tx), batches(1, 4)[0]
    words = r"\(grads, aux\).* optimizer was made with has_aux.*make_train_step as well"
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(make_train_step(loss, tx), *arguments)
    with pytest.raises(ValueError, match="`aux` was given .*has_aux=True"):
        jax.eval_shape(make_train_step(loss, tx), *arguments, {"mean": 0.0})


@pytest.mark.parametrize(
    ("returned", "has_aux", "words"),
    [
        (lambda x: (x.mean(), 0.0), False, "the loss alone .*has_aux=False"),
        (lambda x: x.mean(), True, r"\(loss, aux\) .*has_aux=True"),
        (lambda x: {"loss": x.mean()}, False, "the loss alone"),
        (lambda x: x.mean((-2, -1)), False, r"a scalar, got shape \(4,\).* a stack"),
    ],
)
def test_a_loss_that_is_none(returned, has_aux, words):
    """The last is a scalar of a minibatch, given a stack of four."""
    tx = make("transparent")
    step = make_train_step(lambda p, x, *aux: returned(x), tx, has_aux=has_aux)
    aux = (0.0,) * has_aux
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(step, *start(tx), batches(1, 4)[0], *aux)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (list, TypeError, "`batches` must stack .* a list of 4. Stack it"),
        (lambda x: (x, x[1:]), ValueError, r"the same leading axis L.*\(3, 5, 3\)"),
        (lambda x: (x, 1.0), ValueError, r"the same leading axis L.*\(\), \(4"),
    ],
)
def test_batches_that_are_no_stack(change, error, words):
    tx = make("scanned")
    step = make_train_step(lambda p, batch: loss(p, batch[0]), tx)
    with pytest.raises(error, match=words):
        jax.eval_shape(step, *start(tx), change(batches(1, 4)[0]))


@pytest.mark.parametrize(
    "pick",
    [
        lambda batch: batch["x"],
        lambda batch: next(iter(batch)),
        lambda batch: [jnp.ones((5, 5))][batch],
        lambda batch: batch.x,
    ],
)
def test_grad_fn_without_batches(pick):
    """The number of the gradient is then its batch, which few losses take."""
    grad_fn = jax.grad(lambda params, batch: loss(params, pick(batch)))

    def step(params):
        state = TrainState.create(apply_fn=None, params=params, tx=make("scanned"))
        return state.apply_gradients(grads=params, grad_fn=grad_fn).params

    with pytest.raises(TypeError, match="`grad_fn` without `batches`.*Give `batches=`"):
        jax.eval_shape(step, ragged_params())


def test_modes_are_read_off_the_state():
    wrong = make_train_step(loss, make("transparent"), mode="scanned")
    tx = make("transparent")
    with pytest.raises(
        ValueError, match="`mode` is 'scanned', but .* one gradient per update"
    ):
        wrong(ragged_params(), tx.init(ragged_params()), batches(1, 4)[0])
    with pytest.raises(ValueError, match="`mode` must be one of 'scanned'"):
        make_train_step(loss, tx, mode="opaque")


def test_too_many_minibatches_are_an_error():
    tx = make("scanned")
    step = make_train_step(loss, tx)
    with pytest.raises(ValueError, match="leading axis 3, got shape"):
        step(ragged_params(), tx.init(ragged_params()), batches(1, 6)[0])


@pytest.mark.parametrize("mode", MODES)
def test_equinox(mode):
    """An Equinox model: its arrays are the params, the rest is closed over."""
    model = eqx.nn.MLP(3, 1, 8, 1, activation=jnp.tanh, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss_fn(params, batch):
        predict = jax.vmap(eqx.combine(params, static))
        return jnp.mean((predict(batch)[:, 0] - batch[:, 0]) ** 2)

    tx = make(mode, noise=1e-3)
    step = make_train_step(loss_fn, tx)
    state = tx.init(params)
    first = loss_fn(params, batches(1, 1)[0, 0])
    for stack in batches(60, 4):
        for batch in feed(stack, mode):
            params, state, _ = step(params, state, batch)
    params = optax_flat.eval_params(state, params)
    assert loss_fn(params, batches(1, 1)[0, 0]) < 0.3 * first


def test_train_state_separates_fields_from_extra_arguments():
    class State(TrainState):
        batch_stats: int

    seen = {}

    def update(updates, state, params=None, **extra_args):
        seen.update(extra_args)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: (), update)
    state = State.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=tx, batch_stats=1)
    after = state.apply_gradients(
        grads={"w": jnp.ones(2)}, batch_stats=7, value=3.0, grad_fn=None
    )
    assert seen == {"value": 3.0, "grad_fn": None}
    assert (after.batch_stats, int(after.step)) == (7, 1)
    assert after.tx is tx
    np.testing.assert_array_equal(after.params["w"], 2.0)


def test_train_state_forwards_to_multi_steps():
    tx = optax.MultiSteps(make("scanned"), 1)
    stack = batches(1, 4)[0]
    state = TrainState.create(apply_fn=None, params=ragged_params(), tx=tx)
    grad_fn = jax.grad(loss)
    grads = grad_fn(state.params, stack[0])
    state = state.apply_gradients(grads=grads, grad_fn=grad_fn, batches=stack[1:])
    expected = train(make("scanned"), "scanned", ragged_params(), [stack])
    assert_close(state.params, expected.params)


def test_train_state_takes_plain_optimizers_and_evaluates():
    params = {"w": jnp.ones(2)}
    state = TrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.1))
    state = state.apply_gradients(grads=params, value=1.0)
    np.testing.assert_allclose(state.params["w"], 0.9)
    assert state.eval_params() is state.params
    tx = optax.chain(optax.clip(1.0), make("transparent"))
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    state = state.apply_gradients(grads=params)
    assert (state.params["w"] != 1.0).all()
    np.testing.assert_array_equal(state.eval_params()["w"], 1.0)


def test_history_effective_epochs():
    """One effective epoch is L epochs of single gradients, or one scanned epoch."""
    values = [6.0, 4.0, 2.0, 3.0, 2.0, 1.0, 9.0]
    transparent, scanned = History(3), History(3, mode="scanned")
    for history in (transparent, scanned):
        for value in values:
            history.record(value, jnp.asarray(value / 2))
    assert transparent.eff_loss == [4.0, 2.0]
    assert transparent.eff_val_loss == [2.0, 1.0]
    assert scanned.eff_loss == scanned.loss == values
    arrays = transparent.arrays()
    np.testing.assert_array_equal(arrays["effective_epoch"], [3, 6])
    np.testing.assert_array_equal(arrays["epoch"], np.arange(1, 8))


def test_history_survives_the_disk(tmp_path):
    path = tmp_path / "runs" / "a.json"
    with History(2, path=path) as history:
        history.record(1.0)
        history.record(0.1 + 0.2, 7.0)
    again = History.load(path)
    assert again.loss == history.loss
    assert math.isnan(again.val_loss[0]) and again.val_loss[1] == 7.0
    again.record(5.0)
    History(path=path).close()  # an empty log replaces nothing
    third = History.load(path, path=None)
    third.record(6.0)
    third = History.load(path)
    assert third.loss == [1.0, 0.1 + 0.2, 5.0]
    assert third.num_steps == 2
    path.with_name("a.json.part").write_text("{")  # of a run that was killed
    again.record(6.0)
    third.save(path)
    assert list(tmp_path.rglob("*")) == [path.parent, path]  # no temporary file is left


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_history_stops_at_a_lost_run_and_keeps_the_file(tmp_path, value):
    path = tmp_path / "a.json"
    words = rf"became {value} in epoch 2.*{path}"
    with pytest.raises(FloatingPointError, match=words), History(path=path) as history:
        history.record(1.0)
        history.record(value)
    assert json.loads(path.read_text())["loss"] == [1.0, str(value)]
    np.testing.assert_array_equal(History.load(path).loss, [1.0, value])


def test_history_goes_on_if_told_so():
    history = History(stop=False)
    history.record(math.nan)
    history.record(1.0)
    assert history.loss[1] == 1.0


def test_history_errors(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="`num_steps` must be an int >= 1, got 0"):
        History(0)
    with pytest.raises(ValueError, match="`mode` must be one of"):
        History(mode="both")
    path = tmp_path / "other.json"
    for content in ("[1, 2]", '{"num_steps": 1, "loss": [], "val_loss": []}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="not a History file: expected"):
            History.load(path)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"optax_flat\[progress\]"):
        History(progress=True)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"optax_flat\[tensorboard\]"):
        History(tensorboard=tmp_path)


def test_history_progress_line(capsys):
    with History(total_epochs=2, progress=True, label="run") as history:
        history.record(0.5, 0.25)
        history.record(0.125)
    shown = capsys.readouterr().err
    assert "run: 100%" in shown
    assert "loss=0.125" in shown


@pytest.mark.parametrize("mode", MODES)
def test_donated_buffers_are_gone(mode):
    tx = make(mode)
    step = make_train_step(loss, tx, donate=True)
    params = ragged_params()
    step(params, tx.init(params), feed(batches(1, 4)[0], mode)[0])
    assert params["layer"]["w"].is_deleted()


@pytest.mark.parametrize("mode", MODES)
def test_aux_that_was_infinite_before_moves(mode):
    def loss_fn(params, batch, aux):
        return loss(params, batch), {"count": aux["count"] + 1, "best": aux["best"]}

    tx = make(mode, has_aux=True)
    step = make_train_step(loss_fn, tx, has_aux=True)
    aux = {"count": jnp.array(0), "best": jnp.array(jnp.inf)}
    batch = feed(batches(1, 4)[0], mode)[0]
    *_, aux = step(ragged_params(), tx.init(ragged_params()), batch, aux)
    assert int(aux["count"]) == 1


def test_history_takes_an_epoch_whole_or_not():
    history = History()
    for losses in ((1.0, "2.0"), (1.0, np.ones(2)), (None, 1.0), (True, 1.0)):
        with pytest.raises(TypeError, match="loss` must be a scalar, .* got .*Take"):
            history.record(*losses)
    assert history.loss == history.val_loss == []
    history.record(np.float32(1.0), 2)
    assert (history.loss, history.val_loss) == ([1.0], [2.0])


def test_history_is_on_the_disk_after_every_epoch(tmp_path, monkeypatch):
    """And written as a whole only at the first one and at the end."""
    path, saves, synced = tmp_path / "a.json", [], []
    save, fsync = History.save, os.fsync
    monkeypatch.setattr(History, "save", lambda *args: saves.append(save(*args)))
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(fsync(file)))
    with History(path=path) as history:
        for epoch in range(1, 101):
            history.record(epoch, math.inf)
            assert len(synced) == epoch
            assert History.load(path, path=None).loss == history.loss
        assert len(saves) == 1
    assert len(saves) == 2
    assert json.loads(path.read_text())["loss"] == list(range(1, 101))
    again = History.load(path)
    assert again.val_loss == history.val_loss
    again.record(101.0)
    del again.loss[50:], again.val_loss[50:]  # back to an older checkpoint
    again.record(51.0)
    assert History.load(path).loss == [*range(1, 51), 51.0]


def test_history_drops_an_epoch_that_was_cut_short(tmp_path):
    path = tmp_path / "a.json"
    history = History(path=path)
    for value in (1.0, 2.0):
        history.record(value)
    whole = path.read_bytes()
    history.record(3.0)
    line = path.read_bytes().removeprefix(whole)
    for length in range(len(line)):
        path.write_bytes(whole + line[:length])
        again = History.load(path)
        assert again.loss == [1.0, 2.0]
    again.record(3.0)
    again.record(4.0)
    assert History.load(path).loss == [1.0, 2.0, 3.0, 4.0]


def test_history_and_a_disk_that_fails(tmp_path, monkeypatch):
    """The old file stays, nothing else is left, and the next epoch writes all."""
    path = tmp_path / "a.json"
    history = History(path=path)
    history.record(1.0)

    def fail(file):
        raise OSError

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fail)
        with pytest.raises(OSError):
            history.record(2.0)
        before = path.read_bytes()
        with pytest.raises(OSError):
            history.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    history.record(3.0)
    assert History.load(path).loss == [1.0, 2.0, 3.0]


def test_history_writes_through_a_link(tmp_path):
    real, link = tmp_path / "data" / "a.json", tmp_path / "latest.json"
    link.symlink_to(real)
    with History(path=link) as history:
        history.record(1.0)
        history.record(2.0)
    assert link.is_symlink()
    assert History.load(real).loss == History.load(link).loss == [1.0, 2.0]


def events(folder):
    """Steps and values of every curve, as TensorBoard itself reads the files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {
        name: [(event.step, event.value) for event in reader.Scalars(name)]
        for name in reader.Tags()["scalars"]
        if reader.Scalars(name)  # none is left where all were taken back
    }


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_history_writes_logs_of_other_formats(tmp_path):
    """Losses, those of effective epochs and what the optimizer's state tells."""
    tx = optax_flat.coolmomentum(0.1)
    params = jnp.ones(2)
    state = tx.init(params)
    path, folder = tmp_path / "runs" / "a.csv", tmp_path / "events"
    temperatures = []
    with History(2, csv=path, tensorboard=folder) as history:
        for loss in (4.0, 2.0, 1.0):
            updates, state = tx.update(params, state, params)
            params = optax.apply_updates(params, updates)
            report = optax_flat.metrics(state)
            history.record(loss, loss / 2, metrics=report)
            temperatures.append(float(report["temperature"]))
    rows = table(path)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [row["eff_loss"] for row in rows] == ["", "3.0", ""]
    assert [float(row["val_loss"]) for row in rows] == [2.0, 1.0, 0.5]
    assert [float(row["temperature"]) for row in rows] == temperatures
    curves = events(folder)
    assert curves["loss"] == [(1, 4.0), (2, 2.0), (3, 1.0)]
    assert curves["eff_val_loss"] == [(2, 1.5)]
    assert curves["count"] == [(1, 1), (2, 2), (3, 3)]
    assert curves["temperature"] == list(enumerate(temperatures, 1))


def test_history_goes_on_in_all_its_files(tmp_path):
    """Killed, loaded and taken back an epoch, all have the epochs that count, once."""
    path = tmp_path / "a.json"
    logs = {"csv": tmp_path / "a.csv", "tensorboard": tmp_path / "events"}
    killed = History(path=path, stop=False, **logs)
    killed.record(1.0, metrics={"gamma": 0.5})
    killed.record(math.inf)
    history = History.load(path, **logs)
    assert history.metrics == [{"gamma": 0.5}, {}]
    history.record(3.0, metrics={"gamma": math.nan, "count/2": 7})
    assert history.metrics[2].keys() == {"gamma", "count/2"}
    del history.loss[2:], history.val_loss[2:]  # back to an older checkpoint
    history.record(4.0, metrics={"gamma": 0.75})
    history.close()
    history.record(5.0, 6.0)
    history.close()
    again = History.load(path)
    assert again.loss == [1.0, math.inf, 4.0, 5.0]
    assert again.metrics == history.metrics == [{"gamma": 0.5}, {}, {"gamma": 0.75}, {}]
    assert [row["gamma"] for row in table(logs["csv"])] == ["0.5", "", "0.75", ""]
    assert [row["val_loss"] for row in table(logs["csv"])] == ["", "", "", "6.0"]
    killed.close()
    assert events(logs["tensorboard"]) == {
        "loss": [(1, 1.0), (2, math.inf), (3, 4.0), (4, 5.0)],
        "eff_loss": [(1, 1.0), (2, math.inf), (3, 4.0), (4, 5.0)],
        "val_loss": [(4, 6.0)],
        "eff_val_loss": [(4, 6.0)],
        "gamma": [(1, 0.5), (3, 0.75)],
    }


def test_history_refuses_metrics_it_cannot_keep():
    history = History()
    with pytest.raises(TypeError, match=r"`metrics\['mu'\]` must be a scalar"):
        history.record(1.0, metrics={"mu": jnp.ones(2)})
    with pytest.raises(ValueError, match="`metrics` has loss, the name of a loss"):
        history.record(1.0, metrics={"loss": 1.0})
    assert history.loss == history.metrics == []


FILE = {"num_steps": 1, "mode": "transparent", "loss": [1.0], "val_loss": ["nan"]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss": "1"}, "`loss` must be a list of numbers or of nan, .*got 1"),
        ({"loss": {"1": 2.0}}, "`loss` must be a list of numbers"),
        ({"loss": [True]}, "`loss` must be a list of numbers"),
        ({"val_loss": ["1.0"]}, "`val_loss` must be a list of numbers"),
        ({"val_loss": [None]}, "`val_loss` must be a list of numbers"),
        ({"metrics": {"gamma": [1.0]}}, "`metrics` must be a list of objects, .*got {"),
        ({"metrics": [1.0]}, "`metrics` must be a list of objects"),
        ({"metrics": [{"gamma": None}]}, "`metrics` must be a list of numbers"),
        ({"metrics": []}, "must be of one length, got 1, 1 and 0"),
        ({"val_loss": [1.0, 2.0]}, "must be of one length, got 1, 2 and 1"),
        ({"loss": [10**400]}, "too large"),
        ({"num_steps": 2.0}, "`num_steps` must be a Python int"),
        ({"mode": "both"}, "`mode` must be one of"),
    ],
)
def test_history_refuses_other_files(tmp_path, change, words):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(FILE))
    assert History.load(path).loss == [1.0]
    path.write_text(json.dumps(FILE | change))
    with pytest.raises(ValueError, match=f"a.json is not a History file: .*{words}"):
        History.load(path)


@pytest.mark.parametrize("text", ["", "{", "\n", '{"a": 1}'])
@pytest.mark.parametrize("before", ["", json.dumps(FILE) + "\n"])
def test_history_names_a_file_that_is_damaged(tmp_path, before, text):
    path = tmp_path / "a.json"
    path.write_text(f"{before}{text}\n")
    with pytest.raises(ValueError, match="a.json is not a History file: "):
        History.load(path)
