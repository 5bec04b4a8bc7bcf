"""Random keys in states: their data, which every tool can save.

A typed key is an array that NumPy, Flax and Equinox do not know. A state therefore
holds the key's data, an array of uint32, and the optimizer, which was given the key,
knows of which kind it is.
"""

import jax


def data(key: jax.Array) -> jax.Array:
    """What a state holds of a typed key."""
    return jax.random.key_data(key)


def typed(data: jax.Array, like: jax.Array) -> jax.Array:
    """The typed key of such data, of the kind of the typed key `like`."""
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(like))


def fold_in(data: jax.Array, number: jax.typing.ArrayLike, like: jax.Array):
    """A typed key from such data and a number, of the kind of the typed key `like`."""
    return jax.random.fold_in(typed(data, like), number)
