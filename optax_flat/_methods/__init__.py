"""One file per family of methods; each is re-exported by `optax_flat`."""
