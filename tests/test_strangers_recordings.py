"""Somebody else's recordings to convert: no code is executed, no other file is read."""

import pickle
import struct
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import recordings
import stored
from strangers import change_json

from octolike.data.onboarding.convert import conversion, frame_encoding, video
from octolike.data.onboarding.convert.hdf5 import open_hdf5
from octolike.data.rlds import decode
from octolike.errors import DataError


def external_link(file, secret):
    file["obs/link"] = h5py.ExternalLink(str(secret), "/x")


def external_storage(file, secret):
    file.create_dataset("obs/raw", (4,), "u1", external=[(str(secret), 0, 4)])


def virtual(file, secret):
    layout = h5py.VirtualLayout((3,), "f4")
    layout[:] = h5py.VirtualSource(str(secret), "/x", (3,))
    file.create_virtual_dataset("obs/view", layout)


def bomb(file, secret):
    file.create_dataset("obs/big", (1 << 40,), "u1", chunks=(1 << 20,), compression="gzip")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (external_link, r"'/obs/link' is a link into '.*secret.h5'"),
        (external_storage, r"'/obs/raw' has its values in '.*secret.h5'"),
        (virtual, "'/obs/view' is a view of other files"),
        (bomb, r"'/obs/big' has 1,099,511,627,776 bytes"),
    ],
)
def test_an_hdf5_file_reads_no_other_file(tmp_path, part, message):
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["x"] = np.arange(3, dtype=np.float32)
    with h5py.File(tmp_path / "episode.h5", "w") as file:
        file["action"] = np.zeros((3, 7))
        file.create_group("obs")
        file["obs/again"] = h5py.SoftLink("/obs")  # a circle
        part(file, secret)
    with pytest.raises(DataError, match=message):
        open_hdf5(tmp_path / "episode.h5")


def test_an_hdf5_file_with_views_of_itself_is_read(tmp_path):
    with h5py.File(tmp_path / "episode.h5", "w") as file:
        file["x"] = np.arange(3, dtype=np.float32)
        layout = h5py.VirtualLayout((3,), "f4")
        layout[:] = h5py.VirtualSource(".", "/x", (3,))
        file.create_virtual_dataset("view", layout)
    with open_hdf5(tmp_path / "episode.h5") as file:
        np.testing.assert_array_equal(file["view"], [0, 1, 2])


def png_header(side: int) -> bytes:
    """Return a PNG of side × side that decompresses to gigabytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [9_000, 60_000, 2**31 - 1])
def test_a_decompression_bomb_is_refused_by_its_header(side):
    image = png_header(side)
    with pytest.raises(DataError, match="place"):
        frame_encoding.is_depth_image(image, "place")
    with pytest.raises(decode.tf.errors.OpError, match="more than 67,108,864 pixels"):
        decode.check_image(image)


@pytest.mark.parametrize("format", ["", "progressive"])
def test_a_giant_jpeg_is_refused_by_its_header(format):
    """The header of an ordinary JPEG, rewritten to 65,535 × 65,535."""
    picture = stored.picture(np.random.default_rng(0))
    image = decode.tf.io.encode_jpeg(picture, progressive=bool(format)).numpy()
    height, width = picture.shape[:2]
    size = struct.pack(">HH", height, width)
    assert image.count(size) == 1
    giant = image.replace(size, b"\xff" * 4)
    assert not decode.size_problem(image)
    assert decode.size_problem(giant)
    # libjpeg decodes these, too: bytes between segments, fill bytes, a marker without a length
    end = 4 + int.from_bytes(image[4:6], "big")  # of the first segment
    for between in (b"ab", b"\xff\xff", b"\xff\x01", b"\xff\x00"):
        decode.check_image(image[:end] + between + image[end:])
        assert decode.size_problem(giant[:end] + between + giant[end:])
    for end in range(len(image)):  # truncated anywhere: no error, and not giant
        assert not decode.size_problem(image[:end])


def test_a_gif_is_refused():
    """All of its frames are decompressed, and each has a size of its own."""
    with pytest.raises(decode.tf.errors.OpError, match="expected PNG or JPEG"):
        decode.check_image(b"GIF89a" + struct.pack("<HH", 64, 48) + bytes(20))


@pytest.mark.parametrize("step", [0, 2])
def test_a_dataset_with_a_giant_image_is_named_before_the_stream_decodes_it(step):
    frames = [png_header(64)] * 4
    frames[step] = png_header(60_000)
    with pytest.raises(decode.UndecodableFrameError) as caught:
        decode.black_frames(decode.tf.constant(frames))
    assert caught.value.step == step
    assert "pixels" in str(caught.value.error)


def test_ordinary_images_are_not_giant():
    rng = np.random.default_rng(0)
    for encode in (decode.tf.io.encode_png, decode.tf.io.encode_jpeg):
        assert not decode.size_problem(encode(stored.picture(rng)).numpy())
    for start in (b"", b"\xff\xd8", b"\xff\xd8\xff", b"\x89PNG"):
        assert not decode.size_problem(start)


@pytest.mark.parametrize(
    "text",
    ["#EXTM3U\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile {secret}\n"],
)
def test_a_video_file_that_is_a_playlist_reads_no_other_file(tmp_path, text):
    (tmp_path / "playlist.mp4").write_text(text.format(secret=tmp_path / "secret.ts"))
    with pytest.raises(DataError, match="cannot be decoded"):
        video.list_frames(tmp_path / "playlist.mp4")


def test_a_video_with_giant_frames_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    recordings.video(tmp_path / "video.mp4", recordings.frames(0))
    monkeypatch.setattr(video, "MOST_PIXELS", recordings.SIDE**2 - 1)
    with pytest.raises(DataError, match=r"frames of 16 × 16 pixels; expected at most 255"):
        video.list_frames(tmp_path / "video.mp4")


def test_a_postscript_picture_is_not_given_to_ghostscript():
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(DataError, match="place, step 0 is not an image"):
        frame_encoding.encode([script], frame_encoding.ConvertOptions(), "place")


BAD_INFO = {
    "a width of a billion digits": {"data_path": "data/{episode_index:0900000000d}.parquet"},
    "an attribute": {"data_path": "{video_key.__class__}"},
    "a path outside": {"data_path": "../../secret-{episode_index}.parquet"},
    "an absolute path": {"data_path": "/etc/passwd"},
    "a path that is no text": {"data_path": [1]},
    "features that are no object": {"features": []},
    "a feature without a type": {"features": {"action": {}}},
    "a rate that is no number": {"fps": "x"},
    "a rate of zero": {"fps": 0},
    "splits of words": {"splits": {"train": "a:b", "val": "c:d"}},
    "chunks of no size": {"chunks_size": None},
}


@pytest.mark.parametrize("name", BAD_INFO)
def test_a_malformed_lerobot_dataset_is_one_line(tmp_path, name):
    root = recordings.lerobot(tmp_path / "in", 2, 1, images=True)
    change_json(root / "meta" / "info.json", lambda d: d.update(BAD_INFO[name]))
    with pytest.raises(DataError) as error:
        conversion.convert(root, str(tmp_path / "out"), "robot", conversion.ConversionPlan())
    assert "\n" not in str(error.value)
    assert str(root) in str(error.value)


class Touch:
    """Executes something when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self):
        return Path.touch, (self._path,)


BAD_NPZ = {
    "pickled objects": lambda path: np.savez(
        path, action=np.zeros((4, 3)), x=np.array([Touch(path.with_name("executed"))] * 4)
    ),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Touch(path.with_name("executed")))),
    "an npy file": lambda path: np.save(path.open("wb"), np.zeros(3)),
    "a success of several values": lambda path: np.savez(
        path, action=np.zeros((4, 3)), success=np.ones(2)
    ),
    "a rate that is no number": lambda path: np.savez(
        path, action=np.zeros((4, 3)), control_hz="fast"
    ),
}


@pytest.mark.parametrize("name", BAD_NPZ)
def test_a_malformed_npz_recording_is_one_line_and_executes_nothing(tmp_path, name):
    (tmp_path / "in").mkdir()
    BAD_NPZ[name](tmp_path / "in" / "episode.npz")
    with pytest.raises(DataError) as error:
        conversion.convert(
            tmp_path / "in", str(tmp_path / "out"), "robot", conversion.ConversionPlan()
        )
    assert "\n" not in str(error.value)
    assert not (tmp_path / "in" / "executed").exists()
