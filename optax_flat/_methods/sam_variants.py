r"""The named methods of the sharpness-aware family: pairs of rules for `sam`.

Formulas stand with the rules in `optax_flat.ascent` and `optax_flat.descent`; here are
the papers' defaults, and how we differ from papers and codes.
"""

from typing import Any, Unpack

import optax

from optax_flat import ascent, descent
from optax_flat._core.arguments import factory
from optax_flat._methods.sam import SAMArguments, sam


@factory
def asam(
    outer: optax.GradientTransformation,
    *,
    rho: optax.ScalarOrSchedule = 0.5,
    eta: optax.ScalarOrSchedule = 0.01,
    weights: Any = None,
    **arguments: Unpack[SAMArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""ASAM: a radius relative to the weights.

    .. math::
        e = \rho\, \frac{t^2 g}{\|t g\|}, \qquad t = |w| + \eta \text{ on weights, } 1
        \text{ on other leaves}

    SAM with ``ascent.adaptive_unit(eta)``, which does not depend on how a ReLU network
    spreads its scale over layers. Two gradients per update.

    Cost:
      2 gradients per update; state: 0 copies of the params (transparent: 3) beside
      `outer`'s.

    Args:
      outer: an Optax optimizer, see `sam`.
      rho: the radius, >= 0, relative to the weights; the paper has 0.5 for CIFAR-10, 1
        for CIFAR-100.
      eta: added to the absolute weights, >= 0.
      weights: which leaves are weights, see `ascent.adaptive_unit`; None is those of
        two dimensions or more.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above.
      TypeError: an argument of the wrong type.

    Example:
      Halving one layer and doubling the next changes no loss. With `eta` 0 the
      perturbed loss does not change either:

      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> def loss(w, batch):
      ...     return jnp.sum(jnp.cosh(w[0] * w[1] - 1.0))
      >>> grad_fn = jax.grad(loss)
      >>> def step(w):
      ...     tx = optax_flat.asam(optax.sgd(0.0), eta=0.0, weights=True,
      ...                          mode="transparent")
      ...     updates, _ = tx.update(grad_fn(w, 0), tx.init(w), w)
      ...     return loss(w + updates, 0)  # transparent: at the perturbed point
      >>> bool(jnp.allclose(step(jnp.array([1.0, 3.0])), step(jnp.array([0.5, 6.0]))))
      True


    References:
      Kwon, Kim, Park and Choi, `ASAM: Adaptive Sharpness-Aware Minimization for
      Scale-Invariant Learning of Deep Neural Networks
      <https://arxiv.org/abs/2102.11600>`_, 2021.


    Differs from the paper:
      Nothing. The authors' code finds weights by their name ("weight", which includes
      those of batch normalization), and its CIFAR example has eta 0. davda54/sam and
      pytorch_optimizer have neither eta nor unscaled biases:
      ``asam(outer, rho=rho, eta=0.0, weights=True)``.
    """
    rule = ascent.adaptive_unit(eta, weights=weights)
    return sam(outer, rho=rho, ascent=rule, **arguments)


@factory
def gsam(
    outer: optax.GradientTransformation,
    *,
    rho: optax.ScalarOrSchedule = 0.05,
    alpha: optax.ScalarOrSchedule = 0.4,
    minimize_perturbed: bool = True,
    **arguments: Unpack[SAMArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""GSAM: descends the surrogate gap, perturbed minus plain loss, too.

    .. math::
        d = g_r - \alpha \left(g - \frac{\langle g, g_r\rangle}{\|g_r\|^2} g_r\right)

    SAM with `descent.surrogate_gap`. Two gradients per update. In the paper the radius
    follows the learning rate: ``rho=optax_flat.schedules.proportional_radius(...)``.

    Cost:
      2 gradients per update; state: 0 copies of the params (transparent: 4) beside
      `outer`'s.

    Args:
      outer: an Optax optimizer, see `sam`.
      rho: the radius, >= 0.
      alpha: weight of the gap, >= 0; 0 is SAM.
      minimize_perturbed: False minimizes plain loss and gap, see the rule.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above.
      TypeError: an argument of the wrong type.

    Example:
      With `alpha` 0 it is SAM:

      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> grad_fn = jax.grad(lambda x, batch: jnp.sum(jnp.cosh(x - 0.5)))
      >>> x = jnp.array([1.0, -1.0, 2.0])
      >>> def step(tx):
      ...     return tx.update(grad_fn(x, 0), tx.init(x), x, grad_fn=grad_fn)[0]
      >>> sam = step(optax_flat.sam(optax.sgd(0.1), rho=0.1))
      >>> gsam = step(optax_flat.gsam(optax.sgd(0.1), rho=0.1, alpha=0.0))
      >>> bool(jnp.allclose(sam, gsam))
      True


    References:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
      <https://arxiv.org/abs/2203.08065>`_, 2022.


    Differs from the paper:
      Nothing. The paper has alpha 0.6 and a radius from 0.6 down to 0.1 for a ViT-B/32.
      The authors' LinearScheduler starts at a learning rate of 0 and so at a radius
      below the least.
    """
    rule = descent.surrogate_gap(alpha, minimize_perturbed=minimize_perturbed)
    return sam(outer, rho=rho, descent=rule, **arguments)


@factory
def looksam(
    outer: optax.GradientTransformation,
    *,
    rho: optax.ScalarOrSchedule = 0.1,
    alpha: optax.ScalarOrSchedule = 0.7,
    period: int = 5,
    **arguments: Unpack[SAMArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""LookSAM: the second gradient at every k-th update only.

    .. math::
        d = g_r \text{ at every } k\text{-th update}, \quad
        g + \alpha \frac{\|g\|}{\|g_v\|} g_v \text{ in between}

    with :math:`g_v`, the part of :math:`g_r` orthogonal to g, from the last update that
    computed it. SAM with `descent.reuse`, 1 + 1/k gradients per update: in scanned mode
    the second one is skipped by `jax.lax.cond`, which saves its time (but not under
    `jax.vmap`, where both branches run). In transparent mode a walk takes one call or
    two: `TransparentState.step` is 0 when the next call begins an update and wants a
    new minibatch, and reading it each time waits for the device.

    Cost:
      `1 + 1 / period` gradients per update; state: 1 copy of the params (transparent:
      5) beside `outer`'s.

    Args:
      outer: an Optax optimizer, see `sam`.
      rho: the radius, >= 0.
      alpha: how much of the remembered direction is added, >= 0.
      period: k, >= 1; 1 is SAM.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above.
      TypeError: an argument of the wrong type.

    Example:
      Ten updates with k = 5 take twelve gradients:

      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> grad_fn = jax.grad(lambda x, batch: jnp.sum(jnp.cosh(x)))
      >>> tx = optax_flat.looksam(optax.sgd(0.1), period=5)
      >>> x = jnp.array([1.0, -2.0])
      >>> state = tx.init(x)
      >>> for _ in range(10):
      ...     updates, state = tx.update(grad_fn(x, 0), state, x, grad_fn=grad_fn)
      ...     x = optax.apply_updates(x, updates)
      >>> int(state.gradient_evaluations)
      12


    References:
      Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
      <https://arxiv.org/abs/2203.02714>`_, 2022.


    Differs from the paper:
      Nothing. The authors' code makes its first direction orthogonal to the starting
      params instead of the gradient; pytorch_optimizer projects tensor by tensor.
    """
    rule = descent.reuse(period, alpha)
    return sam(outer, rho=rho, descent=rule, **arguments)


@factory
def friendly_sam(
    outer: optax.GradientTransformation,
    *,
    rho: optax.ScalarOrSchedule = 0.05,
    sigma: optax.ScalarOrSchedule = 1.0,
    decay: optax.ScalarOrSchedule = 0.9,
    **arguments: Unpack[SAMArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""F-SAM: perturbs along what is special to the minibatch.

    .. math::
        e = \rho \frac{g - \sigma m}{\|g - \sigma m\|}, \qquad
        m \leftarrow \lambda m + (1 - \lambda) g

    SAM with `ascent.friendly` in front of `ascent.unit`. The running mean stands for
    the full gradient, whose direction hurts, says the paper. Two gradients per update,
    and a buffer like the params.

    Cost:
      2 gradients per update; state: 1 copy of the params (transparent: 5) beside
      `outer`'s.

    Args:
      outer: an Optax optimizer, see `sam`.
      rho: the radius, >= 0.
      sigma: how much of the running mean is taken off, >= 0; 0 is SAM.
      decay: of the running mean, in [0, 1].

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above.
      TypeError: an argument of the wrong type.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> grad_fn = jax.grad(lambda x, batch: jnp.sum(jnp.cosh(x - 0.5)))
      >>> x = jnp.array([1.0, -1.0, 2.0])
      >>> def step(tx):
      ...     return tx.update(grad_fn(x, 0), tx.init(x), x, grad_fn=grad_fn)[0]
      >>> sam = step(optax_flat.sam(optax.sgd(0.1)))
      >>> bool(jnp.allclose(sam, step(optax_flat.friendly_sam(optax.sgd(0.1)))))
      True


    References:
      Li, Zhou, He, Cheng and Huang, `Friendly Sharpness-Aware Minimization
      <https://arxiv.org/abs/2403.12350>`_, 2024.


    Differs from the paper:
      As in the authors' code the *old* mean is taken off, and the first update is
      SAM's. That code's scripts use rho 0.1 to 0.2 and a decay of 0.6 to 0.95.
    """
    rule = optax.chain(ascent.friendly(sigma, decay), ascent.unit())
    return sam(outer, rho=rho, ascent=rule, **arguments)


@factory
def wsam(
    outer: optax.GradientTransformation,
    *,
    rho: optax.ScalarOrSchedule = 0.05,
    gamma: optax.ScalarOrSchedule = 0.9,
    learning_rate: optax.ScalarOrSchedule | None = None,
    **arguments: Unpack[SAMArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""WSAM: sharpness as a weighted regularizer.

    .. math::
        d = g + \frac{\gamma}{1 - \gamma} (g_r - g)

    SAM with `descent.weighted`. With `learning_rate`, that of `outer`, it is decoupled,
    as the paper prefers: the outer optimizer takes g, and the sharpness term goes past
    its momentum and preconditioner. Two gradients per update.

    Cost:
      2 gradients per update; state: 0 copies of the params (transparent: 4) beside
      `outer`'s.

    Args:
      outer: an Optax optimizer, see `sam`.
      rho: the radius, >= 0.
      gamma: the weight, in [0, 1), useful from 0.8 to 0.95; 0 is `outer`, 1/2 SAM if
        coupled.
      learning_rate: the outer optimizer's, >= 0, to decouple; None couples.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above.
      TypeError: an argument of the wrong type.

    Example:
      Coupled with gamma = 1/2 it is SAM:

      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> grad_fn = jax.grad(lambda x, batch: jnp.sum(jnp.cosh(x - 0.5)))
      >>> x = jnp.array([1.0, -1.0, 2.0])
      >>> def step(tx):
      ...     return tx.update(grad_fn(x, 0), tx.init(x), x, grad_fn=grad_fn)[0]
      >>> sam = step(optax_flat.sam(optax.sgd(0.1)))
      >>> bool(jnp.allclose(sam, step(optax_flat.wsam(optax.sgd(0.1), gamma=0.5))))
      True


    References:
      Yue et al., `Sharpness-Aware Minimization Revisited: Weighted Sharpness as a
      Regularization Term <https://arxiv.org/abs/2305.15817>`_, 2023.


    Differs from the paper:
      The decoupled form must be told the learning rate, since an Optax optimizer does
      not say it. The published code's `max_norm`, which clips g and g_r one by one, is
      ``inner_transform=optax.clip_by_global_norm(max_norm)``.
    """
    rule = descent.weighted(gamma, learning_rate=learning_rate)
    return sam(outer, rho=rho, descent=rule, **arguments)


@factory
def gradient_norm_penalty(
    outer: optax.GradientTransformation,
    *,
    rho: optax.ScalarOrSchedule = 0.05,
    alpha: optax.ScalarOrSchedule = 0.8,
    **arguments: Unpack[SAMArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""A penalty on the gradient's norm, from two gradients.

    .. math::
        d = (1 - \alpha) g + \alpha g_r

    which for small :math:`\rho` is the gradient of
    :math:`f + \alpha \rho \|\nabla f\|`: a penalty of the weight :math:`\lambda` is
    :math:`\alpha = \lambda / \rho`. SAM with `descent.interpolated`. Two gradients per
    update.

    Cost:
      2 gradients per update; state: 0 copies of the params (transparent: 4) beside
      `outer`'s.

    Args:
      outer: an Optax optimizer, see `sam`.
      rho: the radius, >= 0; the paper calls it r.
      alpha: between `outer` (0) and SAM (1), >= 0.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above.
      TypeError: an argument of the wrong type.

    Example:
      On a quadratic the penalty's gradient is exact, whatever the radius:

      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> def loss(x, batch=None):
      ...     return jnp.sum(jnp.array([3.0, 1.0]) * x ** 2) / 2
      >>> penalized = lambda x: loss(x) + 0.1 * jnp.linalg.norm(jax.grad(loss)(x))
      >>> tx = optax_flat.gradient_norm_penalty(optax.sgd(1.0), rho=0.2, alpha=0.5)
      >>> x, grad_fn = jnp.array([1.0, -2.0]), jax.grad(loss)
      >>> updates, _ = tx.update(grad_fn(x), tx.init(x), x, grad_fn=grad_fn)
      >>> bool(jnp.allclose(updates, -jax.grad(penalized)(x)))
      True


    References:
      Zhao, Zhang and Hu, `Penalizing Gradient Norm for Efficiently Improving
      Generalization in Deep Learning <https://arxiv.org/abs/2202.03599>`_, 2022.


    Differs from the paper:
      Nothing. The authors' code by default interpolates with g / ||g|| in the place of
      g. With adaptive outer optimizers keep alpha at 0 during warm-up, by a schedule
      (arXiv 2406.09723).
    """
    rule = descent.interpolated(alpha)
    return sam(outer, rho=rho, descent=rule, **arguments)


@factory
def stable_sam(
    outer: optax.GradientTransformation,
    *,
    rho: optax.ScalarOrSchedule = 0.05,
    **arguments: Unpack[SAMArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""Stable SAM: SAM's direction with the plain gradient's length.

    .. math::
        d = \frac{\|g\|}{\|g_r\|} g_r

    SAM with `descent.renormalized`, which allows larger radii and learning rates. Two
    gradients per update.

    Cost:
      2 gradients per update; state: 0 copies of the params (transparent: 4) beside
      `outer`'s.

    Args:
      outer: an Optax optimizer, see `sam`.
      rho: the radius, >= 0.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above.
      TypeError: an argument of the wrong type.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> grad_fn = jax.grad(lambda x, batch: jnp.sum(jnp.cosh(x - 0.5)))
      >>> x = jnp.array([1.0, -1.0, 2.0])
      >>> tx = optax_flat.stable_sam(optax.sgd(1.0), rho=0.5)
      >>> updates, _ = tx.update(grad_fn(x, 0), tx.init(x), x, grad_fn=grad_fn)
      >>> bool(jnp.allclose(optax.tree.norm(updates), optax.tree.norm(grad_fn(x, 0))))
      True


    References:
      Tan, Zhang, Liu, Wang and Hao, `Stabilizing Sharpness-aware Minimization Through A
      Simple Renormalization Strategy <https://arxiv.org/abs/2401.07250>`_, 2024.


    Differs from the paper:
      The factor is 1 where :math:`g_r` is zero. (Sparse SAM, arXiv 2210.05177, is
      another method of the initials SSAM.)
    """
    return sam(outer, rho=rho, descent=descent.renormalized(), **arguments)


@factory
def loss_equated_sam(
    outer: optax.GradientTransformation,
    *,
    budget: optax.ScalarOrSchedule,
    rho: optax.ScalarOrSchedule = 1.0,
    **arguments: Unpack[SAMArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""LE-SAM: perturbs by a budget of loss, not by a radius.

    .. math::
        e = \min\!\left(\frac{\sigma_t}{\|g\|}, \rho\right) \frac{g}{\|g\|}

    so that to first order the loss rises by the `budget` :math:`\sigma_t` everywhere,
    and what is left to descend is curvature. SAM with `ascent.loss_equated`. Two
    gradients per update.

    Cost:
      2 gradients per update; state: 0 copies of the params (transparent: 3) beside
      `outer`'s.

    Args:
      outer: an Optax optimizer, see `sam`.
      budget: :math:`\sigma_t`, >= 0, in units of the loss. In the paper it falls to 0
        at the end of the training; give a schedule.
      rho: the largest radius, >= 0, which small gradients need.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above.
      TypeError: an argument of the wrong type.

    Example:
      With a budget that never binds it is SAM:

      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> grad_fn = jax.grad(lambda x, batch: jnp.sum(jnp.cosh(x - 0.5)))
      >>> x = jnp.array([1.0, -1.0, 2.0])
      >>> def step(tx):
      ...     return tx.update(grad_fn(x, 0), tx.init(x), x, grad_fn=grad_fn)[0]
      >>> sam = step(optax_flat.sam(optax.sgd(0.1), rho=0.2))
      >>> tx = optax_flat.loss_equated_sam(optax.sgd(0.1), budget=1e6, rho=0.2)
      >>> bool(jnp.allclose(sam, step(tx)))
      True


    References:
      Wang, Liu, Xie and Gao, `Fix the Loss, Not the Radius: Rethinking the Adversarial
      Perturbation of Sharpness-Aware Minimization <https://arxiv.org/abs/2605.10183>`_,
      2026.


    Differs from the paper:
      No constant is added to the norm of g; where that is zero there is no
      perturbation.
    """
    rule = ascent.loss_equated(budget, rho)
    return sam(outer, rho=1.0, ascent=rule, **arguments)


@factory
def zsharp(
    outer: optax.GradientTransformation,
    *,
    rho: optax.ScalarOrSchedule = 0.05,
    quantile: float = 0.95,
    **arguments: Unpack[SAMArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""ZSharp: perturbs along the entries of the gradient that stand out.

    .. math::
        e = \rho \frac{m g}{\|m g\|}, \qquad m_i = 1 \text{ where } |z_i| > Q(|z|)

    with the z-scores of the entries within their leaf. SAM with `ascent.outliers` in
    front of `ascent.unit`. Two gradients per update, and a sort of the gradient, which
    can take longer than both.

    Cost:
      2 gradients per update; state: 0 copies of the params (transparent: 3) beside
      `outer`'s.

    Args:
      outer: an Optax optimizer, see `sam`.
      rho: the radius, >= 0.
      quantile: what part of the entries is left out, in [0, 1).

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above.
      TypeError: an argument of the wrong type.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> grad_fn = jax.grad(lambda x, batch: jnp.sum(jnp.cosh(x)))
      >>> x = jnp.array([0.1, 0.2, 0.3, 5.0])
      >>> tx = optax_flat.zsharp(optax.sgd(0.0), rho=0.5, mode="transparent")
      >>> to_the_point, _ = tx.update(grad_fn(x, 0), tx.init(x), x)
      >>> to_the_point.tolist()
      [0.0, 0.0, 0.0, 0.5]


    References:
      Yun, `Sharpness-Aware Minimization with Z-Score Gradient Filtering
      <https://arxiv.org/abs/2505.02369>`_, 2025.


    Differs from the paper:
      No constant is added to standard deviations and norms; a leaf whose entries are
      all equal has z = 0.
    """
    rule = optax.chain(ascent.outliers(quantile), ascent.unit())
    return sam(outer, rho=rho, ascent=rule, **arguments)


@factory
def ae_sam(
    outer: optax.GradientTransformation,
    *,
    rho: optax.ScalarOrSchedule = 0.05,
    threshold: optax.ScalarOrSchedule = 0.0,
    decay: optax.ScalarOrSchedule = 0.9,
    **arguments: Unpack[SAMArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""AE-SAM: the second gradient only where the first is unusually large.

    .. math::
        d = g_r \text{ if } \|g\|^2 \ge \mu + c_t \sqrt v, \text{ else } g

    with running mean and variance of :math:`\|g\|^2`. SAM with `descent.when_large`,
    between one and two gradients per update; see `looksam` for what that means in
    either mode.

    Cost:
      1 to 2 gradients per update; state: 0 copies of the params (transparent: 4) beside
      `outer`'s.

    Args:
      outer: an Optax optimizer, see `sam`.
      rho: the radius, >= 0.
      threshold: :math:`c_t`, in standard deviations; in the paper linear in t.
      decay: of mean and variance, in [0, 1).

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above.
      TypeError: an argument of the wrong type.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> grad_fn = jax.grad(lambda x, batch: jnp.sum(jnp.cosh(x)))
      >>> tx = optax_flat.ae_sam(optax.sgd(0.1))
      >>> x = jnp.array([1.0, -2.0])
      >>> state = tx.init(x)
      >>> for _ in range(10):  # gradients that only fall are never unusually large
      ...     updates, state = tx.update(grad_fn(x, 0), state, x, grad_fn=grad_fn)
      ...     x = optax.apply_updates(x, updates)
      >>> 10 < int(state.gradient_evaluations) < 20
      True


    References:
      Jiang, Yang, Zhang and Kwok, `An Adaptive Policy to Employ Sharpness-Aware
      Minimization <https://arxiv.org/abs/2304.14647>`_, 2023.


    Differs from the paper:
      Nothing in the formula; the running mean and variance start at zero. The paper's
      :math:`c_t` goes linearly from :math:`\lambda_2` to :math:`\lambda_1`: give an
      `optax.linear_schedule`.
    """
    rule = descent.when_large(decay, threshold)
    return sam(outer, rho=rho, descent=rule, **arguments)
