"""Makes a Python process below `wara-peft run` import `wara_peft` right after it imports `peft`.

Python runs this file when it starts. Importing `wara_peft` at once would cost every process seconds, also processes
that never see an adapter, such as compilers and resource trackers. This file hides another `sitecustomize` that the
environment may have, and so runs that one too.
"""

import os
import sys
import warnings
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from types import ModuleType


class _AfterPeft:
    """A finder that has the other finders find `peft`, and adds the import of `wara_peft` to the module's loading."""

    def find_spec(self, name: str, *args: object) -> "ModuleSpec | None":
        if name != "peft":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(name, *args))), None)  # type: ignore[arg-type]
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            # `wara_peft` itself imports `peft`, so it can only follow once `peft` is complete.
            def exec_module(module: ModuleType) -> None:
                load(module)
                _import_plugin()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _import_plugin() -> None:
    try:
        import wara_peft  # noqa: F401
    except ModuleNotFoundError as error:
        # The process may run another Python than the one that has wara_peft installed. Its program must still start.
        if error.name != "wara_peft":
            raise
        warnings.warn(f"{sys.executable} has no wara_peft, so PEFT will not load WaRA adapters in this process.")


def _run_hidden() -> None:
    """Run the `sitecustomize` that Python would have found without this one."""
    here = os.path.realpath(os.path.dirname(__file__))
    spec = PathFinder.find_spec("sitecustomize", [path for path in sys.path if os.path.realpath(path) != here])
    if spec is not None and spec.loader is not None:
        # Python's own import has put this file under that name. A program that asks for it should get the other one.
        module = sys.modules["sitecustomize"] = module_from_spec(spec)
        spec.loader.exec_module(module)


# The first finder that knows a name wins, so this one must stand before Python's own.
sys.meta_path.insert(0, _AfterPeft())
_run_hidden()
