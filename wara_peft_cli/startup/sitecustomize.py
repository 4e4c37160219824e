"""Makes a Python process below `wara-peft run` import `wara_peft` right after `peft`, or for a compressed model.

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


class _AfterLoading:
    """A finder that has the other finders find the modules in `ACTIONS`, and adds the action to a module's loading."""

    def find_spec(self, name: str, *args: object) -> "ModuleSpec | None":
        if name not in ACTIONS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(name, *args))), None)  # type: ignore[arg-type]
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                ACTIONS[name](module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _import_plugin(_: ModuleType) -> None:
    try:
        import wara_peft  # noqa: F401
    except ModuleNotFoundError as error:
        # The process may run another Python than the one that has wara_peft installed. Its program must still start.
        if error.name != "wara_peft":
            raise
        warnings.warn(f"{sys.executable} has no wara_peft, so PEFT will not load WaRA adapters in this process.")


def _import_plugin_on_use(auto: ModuleType) -> None:
    """Import `wara_peft` when `from_pretrained` asks for the quantizer of a compressed model."""
    get_quantizer = auto.get_hf_quantizer

    def get_hf_quantizer(config: object, *args: object, **kwargs: object) -> object:
        entry = getattr(config, "quantization_config", None)
        if isinstance(entry, dict) and entry.get("quant_method") == "wara_peft":
            _import_plugin(auto)
        return get_quantizer(config, *args, **kwargs)

    auto.get_hf_quantizer = get_hf_quantizer  # type: ignore[attr-defined]


# `wara_peft` imports `peft` and transformers, so it can only follow once they are complete: `peft` when it is loaded,
# transformers when it loads a model. Before that, modules that are half loaded may import the one with the quantizers.
ACTIONS = {
    "peft": _import_plugin,
    "transformers.quantizers.auto": _import_plugin_on_use,
}


def _run_hidden() -> None:
    """Run the `sitecustomize` that Python would have found without this one."""
    here = os.path.realpath(os.path.dirname(__file__))
    spec = PathFinder.find_spec("sitecustomize", [path for path in sys.path if os.path.realpath(path) != here])
    if spec is not None and spec.loader is not None:
        # Python's own import has put this file under that name. A program that asks for it should get the other one.
        module = sys.modules["sitecustomize"] = module_from_spec(spec)
        spec.loader.exec_module(module)


# The first finder that knows a name wins, so this one must stand before Python's own.
sys.meta_path.insert(0, _AfterLoading())
_run_hidden()
