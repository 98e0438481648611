"""For a service whose environment has this folder in PYTHONPATH: a prompt with the token POISON breaks whatever computes it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

POISON = 1999
_BROKEN = "workers.runtime.runtime"


class _Poisoned(importlib.abc.MetaPathFinder):
    """Finds the engine's runtime as it is, and has it break."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The module's spec, whose loader does a little more."""
        if fullname != _BROKEN:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        loader: Any = spec.loader
        execute_module = loader.exec_module

        def exec_module(module: Any) -> None:
            execute_module(module)
            execute = module.Runtime.execute

            def poisoned(self: Any, plan: Any) -> Any:
                if any(POISON in chunk.tokens for chunks in plan.prefills for chunk in chunks):
                    raise RuntimeError("the device does not bear this")
                return execute(self, plan)

            module.Runtime.execute = poisoned

        loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Poisoned())
