"""The engine menu in the viewer's panel."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from nerfstudio.utils.rich_utils import CONSOLE
from nerfstudio.viewer.viewer_elements import ViewerControl, ViewerDropdown

from r2l_nerfstudio.engines.sizes import device_of
from r2l_nerfstudio.engines.switch import EngineOption, EngineSwitch
from r2l_nerfstudio.errors import InputError, exit_on_input_error
from r2l_nerfstudio.user_cache import engine_cache_folder

if TYPE_CHECKING:
    from nerfstudio.viewer.viewer import Viewer

_ON_CPU = ["auto", "torch", "openvino", "onnxruntime", "inductor"]
_ON_GPU = ["auto", "torch", "tensorrt", "inductor", "torch-tensorrt", "triton"]


class EngineMenu(ViewerControl):
    """A drop-down that changes the engine while rendering continues; the panel's line on speed shows which one is
    ready.

    Args:
        engines: switch that the menu controls.
    """

    def __init__(self, engines: EngineSwitch) -> None:
        self.engines = engines
        self._complaint = ""
        self.dropdown = ViewerDropdown(
            "Engine",
            engines.choice,
            sorted({*_ON_CPU, *_ON_GPU}),
            cb_hook=self._chosen,
            hint="What runs the network. auto: the fastest engine that agrees with PyTorch on this machine.",
        )

    def _setup(self, viewer: Viewer) -> None:
        """Set up the control; Nerfstudio's viewer calls this once, before the first frame."""
        super()._setup(viewer)
        with exit_on_input_error():
            self.engines.check()
        on_gpu = device_of(self.engines.network).type == "cuda"
        names = _ON_GPU if on_gpu else _ON_CPU
        self.dropdown.set_options([*names, *({self.engines.choice} - {*names})])
        self.engines.cache_folder = engine_cache_folder()

    def _chosen(self, dropdown: ViewerDropdown) -> None:
        if dropdown.value == self.engines.choice:
            return
        try:
            self.engines.choose(cast(EngineOption, dropdown.value))
            self._complaint = ""
        except InputError as error:
            self._complaint = str(error)
            CONSOLE.print(self._complaint, style="bold yellow", markup=False)
            dropdown.value = self.engines.choice

    def describe(self) -> str:
        """Return as Markdown what renders, what is pending, and why the engine chosen last does not run."""
        return self.engines.describe() + (f"  \n{self._complaint}" if self._complaint else "")
