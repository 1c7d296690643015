"""A small procedural scene with exact images for every camera: the quickstart trains on it and measures against it."""

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
