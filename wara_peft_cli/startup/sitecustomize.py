"""Runs when Python starts below `wara-peft run`: has `wara_peft` imported right after `peft`, wherever that is.

Importing it here would cost every Python seconds, also those that never see an adapter (compilers, resource trackers).
Where there is another `sitecustomize`, which this one hides, that is run too.
"""

import os
import sys
import warnings
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from types import ModuleType


class _AfterPeft:
    """Finds `peft` where everybody finds it, and adds the import of `wara_peft` to its loading."""

    def find_spec(self, name: str, *args: object) -> "ModuleSpec | None":
        if name != "peft":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(name, *args))), None)  # type: ignore[arg-type]
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                _import_plugin()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _import_plugin() -> None:
    try:
        import wara_peft  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "wara_peft":
            raise
        warnings.warn(f"{sys.executable} has no wara_peft, so PEFT will not load WaRA adapters in this process.")


def _run_hidden() -> None:
    """Run the `sitecustomize` that would have been found without this one."""
    here = os.path.realpath(os.path.dirname(__file__))
    spec = PathFinder.find_spec("sitecustomize", [path for path in sys.path if os.path.realpath(path) != here])
    if spec is not None and spec.loader is not None:
        module = sys.modules["sitecustomize"] = module_from_spec(spec)
        spec.loader.exec_module(module)


sys.meta_path.insert(0, _AfterPeft())
_run_hidden()
