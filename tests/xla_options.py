"""Options of XLA that only some versions have."""

from typing import Any

import jax


def known_options(options: dict[str, Any]) -> dict[str, Any]:
    """Returns those of the options of a compilation that this XLA has.

    XLA raises for an option that it does not have, and ends the process for such a flag
    in ``XLA_FLAGS``.
    """
    return {name: value for name, value in options.items() if is_known(name, value)}


def is_known(name: str, value: Any) -> bool:
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True
