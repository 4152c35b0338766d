"""A tiny video for the tests, written with whichever decoder library is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

DECODERS = [name for name in ("av", "cv2") if importlib.util.find_spec(name)]
needs_decoder = pytest.mark.skipif(not DECODERS, reason="neither PyAV nor OpenCV is installed")


def level(frame: int) -> tuple[int, int, int]:
    """The colour (R, G, B) of a frame: R falls and G grows."""
    return 240 - 10 * frame, 20 + 10 * frame, 40


def write_video(path: Path, frames: int = 20, size: tuple[int, int] = (48, 64), noise: bool = False) -> Path:
    """An AVI of motion JPEG: frames of one colour, or with `noise` seeded blocks of all colours."""
    generator = np.random.default_rng(0)
    pictures = []
    for i in range(frames):
        picture = np.empty((*size, 3), np.uint8)
        picture[:] = level(i % 20)
        if noise:
            blocks = generator.integers(0, 256, (size[0] // 8 + 1, size[1] // 8 + 1, 3), dtype=np.uint8)
            picture[:] = blocks.repeat(8, 0).repeat(8, 1)[: size[0], : size[1]]
        pictures.append(picture)
    try:
        import av
    except ImportError:
        av = None
    if av:
        with av.open(str(path), "w", format="avi") as container:
            stream = container.add_stream("mjpeg", rate=25)
            stream.height, stream.width = size
            stream.pix_fmt = "yuvj420p"
            for picture in pictures:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    else:
        import cv2

        writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 25, size[::-1])
        for picture in pictures:
            writer.write(picture[..., ::-1])
        writer.release()
    return path
