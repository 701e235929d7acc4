"""The compiler that Triton asks for; the interpreter never calls it."""

from typing import Any

from triton.backends.compiler import BaseBackend


class CPUBackend(BaseBackend):
    """Takes the target `cpu`."""

    supports_target = staticmethod(lambda target: target.backend == "cpu")

    def hash(self) -> str:
        return "interpreter"

    def parse_options(self, options: dict[str, Any]) -> dict[str, Any]:
        return options

    def add_stages(self, *_: Any) -> None:
        raise NotImplementedError

    def load_dialects(self, _: Any) -> None:
        """None are needed."""

    def get_module_map(self) -> dict[str, Any]:
        return {}
