"""A small procedural scene whose picture is known exactly at every pose: what the quickstart trains on and is judged by."""

from r2l_nerfstudio.scene.capture import band_poses, write_capture
from r2l_nerfstudio.scene.frames import camera_in_dataparser_frame, camera_in_world_frame
from r2l_nerfstudio.scene.procedural import Picture, Scene, pinhole_rays

__all__ = [
    "Picture",
    "Scene",
    "band_poses",
    "camera_in_dataparser_frame",
    "camera_in_world_frame",
    "pinhole_rays",
    "write_capture",
]
