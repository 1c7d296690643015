"""Models are built without their LPIPS network, only inside the context and only in its thread."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torchmetrics.image.lpip
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity as Lpips

from r2l_nerfstudio.lpips import AbsentLpips, without_lpips

# What costs most in each model, for tests that only construct it.
_SMALL = {
    "nerfacto": {"log2_hashmap_size": 8},
    "vanilla-nerf": {},
    "mipnerf": {},
    "tensorf": {"init_resolution": 8},
    "instant-ngp": {"log2_hashmap_size": 8, "grid_resolution": 4, "grid_levels": 1},
    "splatfacto": {"num_random": 20},
}


class NetworkBuilt(Exception):
    """The original metric's network was requested."""


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the real metric fail where it would download its network."""

    def build(**kwargs):
        raise NetworkBuilt

    monkeypatch.setattr(torchmetrics.image.lpip, "_NoTrainLpips", build)


def _is_real() -> bool:
    try:
        Lpips()
    except NetworkBuilt:
        return True
    return False


@pytest.mark.parametrize("method", _SMALL)
def test_stock_models_are_built_without_it(method: str) -> None:
    from nerfstudio.configs.method_configs import all_methods
    from nerfstudio.data.scene_box import SceneBox

    config = copy.deepcopy(all_methods[method].pipeline.model)
    for field, value in _SMALL[method].items():
        assert hasattr(config, field)
        setattr(config, field, value)
    box = SceneBox(aabb=torch.tensor([[-1.0, -1, -1], [1, 1, 1]]))
    with without_lpips():
        model = config.setup(scene_box=box, num_train_data=3, metadata={}, device="cpu", grad_scaler=None)
    image = torch.rand(1, 3, 8, 8)
    assert torch.isnan(model.lpips(image, image))
    assert list(model.lpips.parameters()) == list(model.lpips.buffers()) == []
    assert not [key for key in model.state_dict() if "lpips" in key]


def test_evaluation_reports_nan() -> None:
    with without_lpips():
        metric = Lpips(net_type="vgg", normalize=True)
    assert isinstance(metric, AbsentLpips)
    image = torch.rand(2, 3, 8, 8)
    value = metric.to("cpu").eval()(image, image)
    assert value.shape == () and value.device == image.device and value != value


def test_only_inside_and_also_after_an_error() -> None:
    assert _is_real()
    with pytest.raises(ValueError, match="inside"), without_lpips():
        with without_lpips():
            assert not _is_real()
        assert not _is_real()
        raise ValueError("inside")
    assert _is_real()


def test_other_threads_keep_the_original() -> None:
    seen = []
    with without_lpips():
        thread = threading.Thread(target=lambda: seen.append(_is_real()))
        thread.start()
        thread.join()
    assert seen == [True]


def test_overlapping_threads_restore_it() -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with without_lpips():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    with without_lpips():
        thread.start()
        assert entered.wait(10)
    assert _is_real()  # this thread has left, the other is still inside
    leave.set()
    thread.join()
    assert _is_real()
    assert Lpips.__init__.__module__ == "torchmetrics.image.lpip"
