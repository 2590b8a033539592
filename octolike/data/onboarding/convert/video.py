"""Frames of a video at given times, read by the ffmpeg of imageio-ffmpeg (AV1 included).

    listing = list_frames(path)                      # the time of every frame, without decoding
    frames = listing.nearest(times, place)           # the frame of each row, or DataError
    for pixels in read_frames(listing, frames): ...

The times are those that the file states for its frames: another frame rate than that of the rows,
rows that were cut, and a varying frame rate shift nothing.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np

from octolike.data.rlds.decode import MOST_PIXELS
from octolike.errors import DataError

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,ogg,gif"
_DISCARD = 0x4  # ffmpeg's flag of a packet that is decoded but not shown
_SLACK = 1e-4  # seconds: rows store their time as float32
_SIXTEEN_BITS = re.compile(r"gray(9|10|12|14|16)(le|be)")


@dataclass(frozen=True, eq=False)
class VideoListing:
    """The frames of a video file.

    Attributes:
        path: the file.
        times: float64 [N], seconds, increasing.
        size: (h, w).
        pixel_format: in ffmpeg's words, such as yuv420p.
    """

    path: Path
    times: np.ndarray
    size: tuple[int, int]
    pixel_format: str

    @cached_property
    def interval(self) -> float:
        """Seconds between two frames."""
        return float(np.median(np.diff(self.times))) if len(self.times) > 1 else np.inf

    @property
    def is_depth(self) -> bool:
        """Whether the pixels have one channel of more than 8 bits."""
        return bool(_SIXTEEN_BITS.fullmatch(self.pixel_format))

    def nearest(
        self, times: np.ndarray, place: str, first: float = -np.inf, end: float = np.inf
    ) -> np.ndarray:
        """Return the frame nearest to each of T times: int64 [T].

        first, end: seconds; only frames in [first, end) count (an episode's part of the file).
        Raises DataError, naming `place`, for a time more than half a frame from every frame.
        """
        margin = 0.5 * min(self.interval, 1.0)
        usable = np.flatnonzero(
            (self.times > first - margin - _SLACK) & (self.times < end - margin + _SLACK)
        )
        if not len(usable):
            raise DataError(
                f"{place}: {self.path} has {len(self.times)} frames, none of them between "
                f"{first:.3f} and {end:.3f} s; copy the dataset again"
            )
        stamps = self.times[usable]
        after = np.clip(np.searchsorted(stamps, times), 1, max(len(stamps) - 1, 1))
        after = np.minimum(after, len(stamps) - 1)
        before = np.maximum(after - 1, 0)
        nearer = np.where(times - stamps[before] <= stamps[after] - times, before, after)
        distance = np.abs(stamps[nearer] - times)
        if (distance > margin + _SLACK).any():
            step = int(np.argmax(distance > margin + _SLACK))
            raise DataError(
                f"{place}: the row of step {step} is at {times[step]:.3f} s, but the nearest of "
                f"{len(stamps)} frames in {self.path} is at {stamps[nearer[step]]:.3f} s, more "
                f"than half a frame ({margin:.3f} s) away; leave such episodes out with --drop-bad "
                "or cut their rows to the length of the video"
            )
        return usable[nearer]


def list_frames(path: Path) -> VideoListing:
    """Return the frames of a video file; DataError if it is missing or cannot be decoded."""
    if not path.is_file():
        raise DataError(f"its video {path} is missing; copy the dataset again")
    return _list_frames(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=256)  # a file of LeRobot 3 holds many episodes
def _list_frames(path: Path, _changed: int) -> VideoListing:
    # -copyts: times as stored, not relative to the first one.
    arguments = ["-copyts", "-i", str(path), "-map", "0:v:0", "-c", "copy", "-f", "framecrc", "-"]
    done = subprocess.run(_ffmpeg(*arguments), capture_output=True, text=True, errors="replace")
    base = re.search(r"^#tb 0: (\d+)/(\d+)", done.stdout, re.MULTILINE)
    size = re.search(r"^#dimensions 0: (\d+)x(\d+)", done.stdout, re.MULTILINE)
    pixel_format = re.search(r"Video: [^,]+, (\w+)", done.stderr)
    times = []
    for line in done.stdout.splitlines():
        if not line.startswith("#"):
            columns = line.split(",")
            flags = next((c.partition("=")[2] for c in columns if c.strip().startswith("F=")), "0")
            times += [int(columns[2])] if not int(flags, 16) & _DISCARD else []
    if base is None or size is None or pixel_format is None or not times:
        raise DataError(f"{path} cannot be decoded: {_reason(done.stderr)}; copy it again")
    width, height = int(size[1]), int(size[2])
    if width * height > MOST_PIXELS:
        raise DataError(
            f"{path} has frames of {width} × {height} pixels; expected at most {MOST_PIXELS:,}"
        )
    seconds = np.sort(np.array(times)) * int(base[1]) / int(base[2])
    return VideoListing(path, seconds, (height, width), pixel_format[1])


def read_frames(
    listing: VideoListing, frames: Sequence[int] | np.ndarray, place: str
) -> Iterator[np.ndarray]:
    """Yield the frames of the given numbers, which must not decrease.

    uint8 [h, w, 3], RGB, or uint16 [h, w, 1] of a depth video. Raises DataError, naming `place`,
    for a video that cannot be decoded up to the last of them.
    """
    (height, width), first, last = listing.size, int(frames[0]), int(frames[-1])
    kind, channels = "rgb24", 3
    dtype: np.dtype[Any] = np.dtype(np.uint8)
    if listing.is_depth:  # in its own format: a conversion would rescale the values
        kind, channels = listing.pixel_format, 1
        dtype = np.dtype("<u2" if kind.endswith("le") else ">u2")
    seek = []
    if first:
        middle = (listing.times[first - 1] + listing.times[first]) / 2
        seek = ["-seek_timestamp", "1", "-ss", f"{middle:.6f}"]
    # The image as stored, like LeRobot: ffmpeg would turn it by the file's rotation tag.
    command = _ffmpeg("-v", "error", "-noautorotate", *seek, "-i", str(listing.path))
    command += ["-map", "0:v:0", "-frames:v", str(last - first + 1), "-fps_mode", "passthrough"]
    command += ["-f", "rawvideo", "-pix_fmt", kind, "-"]
    size = height * width * channels * dtype.itemsize
    with (
        tempfile.TemporaryFile() as messages,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages) as process,
    ):
        assert process.stdout is not None
        try:
            number, data = first - 1, b""
            for frame in frames:
                while number < frame:
                    data, number = process.stdout.read(size), number + 1
                if len(data) < size:
                    messages.seek(0)
                    reason = _reason(messages.read().decode(errors="replace"))
                    raise DataError(
                        f"{place}: {listing.path} cannot be decoded from frame {number} of "
                        f"{len(listing.times)}: {reason}; copy it again"
                    )
                pixels = np.frombuffer(data, dtype).reshape(height, width, channels)
                yield pixels.astype(np.uint16) if listing.is_depth else pixels
        finally:
            process.kill()


def _ffmpeg(*arguments: str) -> list[str]:
    # Only containers with the video in them: a playlist (HLS, concat) would read other files.
    formats = ("-format_whitelist", CONTAINERS, "-protocol_whitelist", "file")
    return [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", *formats, *arguments]


def _reason(messages: str) -> str:
    """Return the first error line of ffmpeg's messages, without the address of its part."""
    lines = [re.sub(r"^\[[^\]]*\] ", "", x).strip() for x in messages.splitlines()]
    errors = [x for x in lines if re.search(r"error|invalid|not found|missing|partial", x, re.I)]
    return (errors or lines[-1:] or ["no frames"])[0]
