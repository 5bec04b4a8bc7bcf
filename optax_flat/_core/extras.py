"""Optional packages, imported where they are used."""

import importlib
from typing import Any


def load(module: str, extra: str, user: str) -> Any:
    """Imports `module`; where it is missing, says which extra `user` needs."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or package).partition(".")[0] != package:
            raise  # it is there, and misses something of its own
        raise ImportError(
            f"{user} needs {package}, which the extra `{extra}` installs: pip install "
            f"'.[{extra}]' in a checkout of optax_flat, pip install "
            f"'optax_flat[{extra}]' elsewhere."
        ) from error
