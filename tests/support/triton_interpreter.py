"""Triton's interpreter without work that it repeats, a third of what tests of kernels take.

It replaces private functions of the version that requirements/ pins; each does what it did.
"""

from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def speed_up() -> None:
    """From now on. Call it once, before kernels run."""
    _prepare_language_once()
    _remember_numpy_types()


def _prepare_language_once() -> None:
    """The language's functions are replaced when a kernel begins, and not by each function that it
    calls as well."""
    patch: Callable[[Any], Any] = interpreter._patch_lang
    prepared: set[int] = set()

    class Scope:
        """Ends what a kernel has begun."""

        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def restore(self) -> None:
            prepared.clear()
            self._inner.restore()

    def prepare(fn: Any) -> Any:
        seen = fn.__globals__.values()
        languages = {id(value) for value in seen if value is tl or value is tl.core}
        if languages <= prepared:
            # Of a function that a kernel calls: nobody restores it.
            return None
        prepared.update(languages)
        return Scope(patch(fn))

    interpreter._patch_lang = prepare


def _remember_numpy_types() -> None:
    """NumPy's types are looked up by name, without a table made for each look."""
    of_numpy: dict[str, Any] = {}
    numpy_type = interpreter._get_np_dtype

    def remembered(element: Any) -> Any:
        name = element.scalar.name
        if name not in of_numpy:
            of_numpy[name] = numpy_type(element)
        return of_numpy[name]

    interpreter._get_np_dtype = remembered
