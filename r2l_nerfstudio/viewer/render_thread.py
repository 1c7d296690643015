"""Tell whether Nerfstudio's viewer is rendering."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from nerfstudio.viewer.render_state_machine import RenderStateMachine


def current_render_thread() -> RenderStateMachine | None:
    """Return the viewer's render thread if it calls this: speed matters, and it may be interrupted at any line."""
    # Not imported here: that module imports splatfacto and with it PyTorch's compiler, two thirds of the time that
    # `r2l-export --help` took. Without the module there is no such thread.
    module = sys.modules.get("nerfstudio.viewer.render_state_machine")
    thread = threading.current_thread()
    if module is None or not isinstance(thread, module.RenderStateMachine):
        return None
    return cast("RenderStateMachine", thread)
