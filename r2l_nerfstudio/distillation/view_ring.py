"""A ring of teacher views on the device: the training data, rendered during training."""

from __future__ import annotations

import hashlib
import io
import re
import time
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from jaxtyping import Float, Int, UInt8
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.utils.rich_utils import CONSOLE, get_progress
from torch import Tensor

from r2l_nerfstudio.disk import write_atomically
from r2l_nerfstudio.distillation.foreground import TRIES, first_in_foreground
from r2l_nerfstudio.distillation.pose_sampling import PoseSampler
from r2l_nerfstudio.distillation.ray_sample import RaySample
from r2l_nerfstudio.distillation.survey import Survey, thumbnail
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.rays.conventions import OURS, RayConventions
from r2l_nerfstudio.rays.pinhole import pinhole_rays
from r2l_nerfstudio.teacher import Teacher, TeacherOutputs
from r2l_nerfstudio.torch_compat import OutOfMemoryError

BYTES_PER_PIXEL = 7  # rgb, accumulation and validity in uint8, depth in fp16.
MAX_REJECTIONS = 20


@dataclass
class TeacherView:
    """A teacher view as it is stored."""

    camera_to_world: Float[Tensor, "3 4"]
    intrinsics: Float[Tensor, "4"]
    pixels: UInt8[Tensor, "height width 5"]
    """rgb, accumulation, and 1 where the teacher's color was finite."""
    depth: Float[Tensor, "height width"]
    """Distance along the ray in fp16, in the teacher's unit; 0 where there is none."""


class ViewRenderer:
    """Renders numbered teacher views: view i is the same whenever it is rendered.

    Args:
        teacher: teacher to render with.
        sampler: sampler of cameras.
        survey: decides which views are plausible.
        height: of the views, in pixels.
        width: of the views, in pixels.
        seed: seed of the numbered cameras.
        cache_dir: folder to keep rendered views in, for a later run; None keeps none.
    """

    def __init__(
        self,
        teacher: Teacher,
        sampler: PoseSampler,
        survey: Survey,
        height: int,
        width: int,
        seed: int,
        cache_dir: Path | None = None,
    ) -> None:
        self.teacher = teacher
        self.sampler = sampler
        self.survey = survey
        self.height = height
        self.width = width
        self.seed = seed
        self.cache_dir = cache_dir
        self.rejected = 0
        self.invalid_pixels = 0
        self.seconds = 0.0
        self._warn_at = 1
        if cache_dir is not None:
            self._open_cache(cache_dir)

    def _open_cache(self, cache_dir: Path) -> None:
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            started = psutil.Process().create_time()
            for partial in cache_dir.glob("*.partial"):
                # Left by a process that was killed while writing.
                owner = re.fullmatch(r".*\.(\d+)\.partial", partial.name)
                is_written = owner is not None and psutil.pid_exists(int(owner[1]))
                if not is_written and partial.lstat().st_mtime < started:
                    partial.unlink()
        except OSError as error:
            self._leave_cache(error)

    def _leave_cache(self, error: OSError) -> None:
        CONSOLE.print(
            f"[bold yellow]Going on without the cache of teacher views: {self.cache_dir} cannot be written to"
            f" ({error.strerror or error}).",
            soft_wrap=True,
        )
        self.cache_dir = None

    def render(self, index: int) -> TeacherView:
        """Return teacher view number `index`, from the cache if it is there.

        Raises:
            InputError: if no plausible camera is found.
        """
        start = time.perf_counter()
        view = self._load(index)
        if view is None:
            view = self._render(index)
            self._store(index, view)
        invalid = int((view.pixels[..., 4] == 0).sum())
        if invalid:
            self.invalid_pixels += invalid
            if self.invalid_pixels >= self._warn_at:
                CONSOLE.print(
                    f"[bold yellow]The teacher rendered non-finite colors: dropped {self.invalid_pixels} pixels so far."
                )
                self._warn_at = 10 * self.invalid_pixels
        self.seconds += time.perf_counter() - start
        return view

    def _render(self, index: int) -> TeacherView:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        for _ in range(MAX_REJECTIONS):
            pose, intrinsics = self.sampler.sample(generator, self.sampler.is_zoomed(index))
            camera = self._camera(pose, intrinsics)
            if self._plausible(camera):
                return self._ask(camera, pose, intrinsics)
            self.rejected += 1
        raise InputError(
            f"{MAX_REJECTIONS} consecutive sampled cameras were implausible (nothing in front of them, or too close):"
            " choose another --pipeline.datamanager.pose-sampler.kind, or a smaller"
            " --pipeline.datamanager.pose-sampler.jitter."
        )

    def _camera(self, pose: Tensor, intrinsics: Tensor) -> Cameras:
        fx, fy, cx, cy = intrinsics.tolist()
        return Cameras(pose[None], fx=fx, fy=fy, cx=cx, cy=cy, width=self.width, height=self.height)

    def _plausible(self, camera: Cameras) -> bool:
        """Return whether a thumbnail resembles the training views: it shows something, and not from inside it."""
        if not (self.survey.has_accumulation or self.survey.has_depth):
            return True
        outputs = self._view(thumbnail(camera, 24))
        finite = outputs.rgb.isfinite().all(-1)
        if not finite.any():
            return False
        seen = finite
        if outputs.accumulation is not None:
            if float(outputs.accumulation[finite].nan_to_num(1.0).mean()) < 0.3 * self.survey.lowest_accumulation:
                return False
            seen = seen & (outputs.accumulation[..., 0] > 0.5)
        if outputs.depth is None or not seen.any():
            return True
        depth = outputs.depth[..., 0][seen]
        depth = depth[depth.isfinite() & (depth > 0)]
        return len(depth) == 0 or float(depth.quantile(0.1)) > 0.3 * self.survey.nearest_depth

    def _view(self, camera: Cameras) -> TeacherOutputs:
        """Render the teacher, without the outputs that the survey found to be missing."""
        outputs = self.teacher.view(camera)
        return replace(
            outputs,
            accumulation=outputs.accumulation if self.survey.has_accumulation else None,
            depth=outputs.depth if self.survey.has_depth else None,
        )

    def _ask(self, camera: Cameras, pose: Tensor, intrinsics: Tensor) -> TeacherView:
        outputs = self._view(camera)
        valid = outputs.rgb.isfinite().all(-1, keepdim=True)
        accumulation = torch.ones_like(valid) if outputs.accumulation is None else outputs.accumulation
        depth = torch.zeros_like(valid) if outputs.depth is None else outputs.depth
        color = torch.cat([outputs.rgb.nan_to_num(0.0), accumulation.float().nan_to_num(1.0)], dim=-1).clamp(0, 1)
        pixels = torch.cat([(color * 255).round().to(torch.uint8), valid.to(torch.uint8)], dim=-1)
        # fp16 ends at 65504; a larger distance counts as infinite.
        depth = depth[..., 0].float().nan_to_num(0.0, posinf=6e4).clamp(0, 6e4).half()
        # On the host, since a view may come from another thread, and so from another stream of a GPU.
        return TeacherView(pose, intrinsics, pixels.cpu(), depth.cpu())

    def _path(self, index: int) -> Path | None:
        return None if self.cache_dir is None else self.cache_dir / f"view_{self.seed}_{index:06d}.npz"

    def _load(self, index: int) -> TeacherView | None:
        path = self._path(index)
        if path is None or not path.is_file():
            return None
        try:
            with zipfile.ZipFile(path) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > self.height * self.width * 7 + 4096:
                    return None
            with np.load(path, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in ("camera_to_world", "intrinsics", "pixels", "depth")}
                is_same = str(stored["sha256"]) == _digest(arrays)
        except Exception:  # A damaged file is rendered again, whatever is damaged in it.
            return None
        view = TeacherView(**{name: torch.from_numpy(array) for name, array in arrays.items()})
        return view if is_same and self._is_whole(view) else None

    def _is_whole(self, view: TeacherView) -> bool:
        kinds = {
            "camera_to_world": ((3, 4), torch.float32),
            "intrinsics": ((4,), torch.float32),
            "pixels": ((self.height, self.width, 5), torch.uint8),
            "depth": ((self.height, self.width), torch.float16),
        }
        for name, (shape, kind) in kinds.items():
            value = getattr(view, name)
            if tuple(value.shape) != shape or value.dtype != kind or not bool(value.isfinite().all()):
                return False
        return bool((view.intrinsics[:2] > 0).all()) and bool((view.depth >= 0).all())

    def _store(self, index: int, view: TeacherView) -> None:
        path = self._path(index)
        if path is None:
            return
        arrays: dict[str, Any] = {
            "camera_to_world": view.camera_to_world.numpy(),
            "intrinsics": view.intrinsics.numpy(),
            "pixels": view.pixels.numpy(),
            "depth": view.depth.numpy(),
        }
        buffer = io.BytesIO()
        np.savez_compressed(buffer, sha256=np.array(_digest(arrays)), **arrays)
        try:
            write_atomically(path, buffer.getvalue())
        except OSError as error:  # A full disk above all.
            self._leave_cache(error)


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name}{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


class ViewRing:
    """Teacher views in uint8 on the device; during training new ones replace the oldest.

    Args:
        renderer: renderer of the numbered views.
        num_views: views to hold; fewer if memory is short.
        device: device of the views.
        room_bytes: bytes of the device's free memory that training needs for itself.
    """

    has_geometry = True
    """Whether accumulation and depth are known, if the teacher has them."""

    def __init__(self, renderer: ViewRenderer, num_views: int, device: torch.device | str, room_bytes: int = 0) -> None:
        self.renderer = renderer
        self.device = torch.device(device)
        self._room_bytes = room_bytes
        self.height, self.width = renderer.height, renderer.width
        self._allocate(num_views)
        self._filled = 0
        self._next_index = 0
        self._zoomed_slots: set[int] = set()
        self.crop_views: Int[Tensor, "views"] | None = None
        """Numbers of the views that crops are drawn from, if not from all: those of one focal length."""

    def __len__(self) -> int:
        return self._filled

    @property
    def capacity(self) -> int:
        """Views that the ring can hold."""
        return len(self.pixels)

    @property
    def views_put(self) -> int:
        """Views that were put into the ring so far; number i is, or was, in slot i modulo `capacity`."""
        return self._next_index

    def _allocate(self, num_views: int) -> None:
        wanted = num_views
        free = free_memory(self.device)
        num_views = min(num_views, affordable_views(free, self._room_bytes, self.width, self.height))
        while num_views > 0:
            try:
                size = (num_views, self.height, self.width)
                self.pixels = torch.empty(*size, 5, dtype=torch.uint8, device=self.device)
                self.depth = torch.empty(*size, dtype=torch.float16, device=self.device)
                break
            except (OutOfMemoryError, RuntimeError):  # CPU allocators raise the latter.
                num_views //= 2
        if num_views == 0:
            raise InputError(
                f"No memory on {self.device} for a single {self.width}x{self.height} teacher view beside training, which"
                f" takes {self._room_bytes / 2**30:.1f} of {free / 2**30:.1f} GiB: free memory, or lower the resolution"
                " with --pipeline.datamanager.view-downscale."
                if self._room_bytes
                else f"No memory on {self.device} for a single {self.width}x{self.height} teacher view: free memory, or"
                " lower the resolution with --pipeline.datamanager.view-downscale."
            )
        if num_views < wanted:
            CONSOLE.print(
                f"[bold yellow]{self.device} has room for {num_views} of {wanted} teacher views: holding that many"
                " (--pipeline.datamanager.num-views)."
            )
        self.camera_to_worlds = torch.empty(num_views, 3, 4, device=self.device)
        self.intrinsics = torch.empty(num_views, 4, device=self.device)

    def fill(self, seconds: float | None = None) -> None:
        """Render until the ring is full, with a progress bar.

        Args:
            seconds: stop after so long, with at least one view; `refresh` then adds the others.
        """
        missing = self.capacity - self._filled
        if missing == 0:
            return
        end = None if seconds is None else time.monotonic() + seconds
        with get_progress(f"Teacher views ({self.width}x{self.height})", suffix="views/s") as progress:
            for _ in progress.track(range(missing)):
                self.refresh()
                if end is not None and time.monotonic() >= end:
                    break
        if self._filled < self.capacity:
            CONSOLE.print(
                f"Starting with {self._filled} of {self.capacity} teacher views; rendering the rest during training."
            )

    def refresh(self) -> None:
        """Render the next numbered view in place of the oldest."""
        self.put(self.render_next())

    def render_next(self) -> TeacherView:
        """Return the next numbered view, for `put`; the ring does not change, so another thread may do this."""
        return self.renderer.render(self._next_index)

    def put(self, view: TeacherView) -> None:
        """Put a view of `render_next` in place of the oldest."""
        slot = self._next_index % self.capacity
        self.pixels[slot] = view.pixels.to(self.device)
        self.depth[slot] = view.depth.to(self.device)
        self.camera_to_worlds[slot] = view.camera_to_world.to(self.device)
        self.intrinsics[slot] = view.intrinsics.to(self.device)
        self._next_index += 1
        self._filled = min(self._filled + 1, self.capacity)
        if self.renderer.sampler.is_zoomed(self._next_index - 1):
            self._zoomed_slots.add(slot)
        else:
            self._zoomed_slots.discard(slot)
        others = [slot for slot in range(self._filled) if slot not in self._zoomed_slots]
        # A ring of one view may hold nothing but a zoomed one.
        is_mixed = 0 < len(others) < self._filled
        self.crop_views = torch.tensor(others, device=self.device) if is_mixed else None

    def sample(
        self,
        num_rays: int,
        generator: torch.Generator | None = None,
        foreground_fraction: float = 0.0,
        conventions: RayConventions = OURS,
    ) -> RaySample:
        """Draw rays uniformly over all pixels of all views in the ring.

        Args:
            num_rays: number of rays.
            generator: on the ring's device, for a repeatable draw.
            foreground_fraction: share of the rays that is drawn from the foreground.
            conventions: how the student's ray encoding reads rays.
        """
        num_foreground = int(foreground_fraction * num_rays)
        num_pixels, stored = self._filled * self.height * self.width, self.pixels.view(-1, 5)

        def draw(*shape: int) -> Tensor:
            return torch.randint(num_pixels, shape, generator=generator, device=self.device)

        flat = draw(num_rays - num_foreground)
        if num_foreground:
            tries = draw(TRIES, num_foreground)
            taken = first_in_foreground(stored[tries, 3])
            flat = torch.cat([flat, tries.gather(0, taken[None])[0]])
        view = flat // (self.height * self.width)
        x = (flat % self.width).float() + conventions.pixel_offset
        y = (flat // self.width % self.height).float() + conventions.pixel_offset
        origins, directions = pinhole_rays(
            self.camera_to_worlds[view], self.intrinsics[view], torch.stack([x, y], dim=-1), conventions.is_planar
        )
        pixels = stored[flat]
        return RaySample(
            origins=origins,
            directions=directions,
            rgb=pixels[:, :3].float() / 255,
            accumulation=pixels[:, 3:4].float() / 255,
            depth=self.depth.view(-1)[flat].float()[:, None],
            weight=pixels[:, 4:5].float(),
            geometry_weight=pixels[:, 4:5].float(),
        )


def affordable_views(free_bytes: int, room_bytes: int, width: int, height: int) -> int:
    """Return how many views a device holds, with a fifth to spare.

    Args:
        free_bytes: bytes that can be allocated.
        room_bytes: bytes of them that training needs for itself.
        width: width of a view in pixels.
        height: height of a view in pixels.
    """
    return max(0, int(0.8 * (free_bytes - room_bytes))) // (height * width * BYTES_PER_PIXEL)


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
