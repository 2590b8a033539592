"""The wire format: arrays survive, and no message makes the decoder allocate, execute or crash."""

import contextlib
import io
import struct
import zlib

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from octolike.policy import wire
from octolike.policy.wire import Limits, WireError, pack, unpack

# derandomize: the same messages in every run
FEW = settings(deadline=None, derandomize=True, database=None)
MANY = settings(FEW, max_examples=300)
DTYPES = ("|b1", "|u1", "<i2", "<i4", "<i8", "<f2", "<f4", "<f8", ">f4")
ARRAYS = st.sampled_from(DTYPES).flatmap(
    lambda dtype: arrays.arrays(np.dtype(dtype), arrays.array_shapes(min_dims=0, min_side=0))
)
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.floats()
MESSAGES = st.recursive(
    ARRAYS | SCALARS,
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(), x, max_size=4),
    max_leaves=8,
)


def same(a, b):
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


@settings(FEW)
@given(MESSAGES, st.booleans())
def test_what_is_packed_is_what_is_unpacked(message, text_keys):
    assert same(message, unpack(pack(message, text_keys)))


@settings(MANY)
@given(st.binary(max_size=400))
def test_any_bytes_are_a_message_or_a_wire_error(data):
    with contextlib.suppress(WireError):
        unpack(data)


@settings(MANY)
@given(MESSAGES, st.data())
def test_a_changed_message_is_a_message_or_a_wire_error(message, data):
    """Truncated, extended, or with flipped bytes."""
    bits = bytearray(pack(message))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(bits) - 1))
        bits[place] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(bits)))
    for broken in (bytes(bits), bytes(bits[:cut]), bytes(bits) + b"\xc0"):
        with contextlib.suppress(WireError):
            unpack(broken)


FIELDS = {
    b"__ndarray__": st.just(True),
    b"data": st.binary(max_size=64) | SCALARS,
    b"dtype": st.sampled_from([*DTYPES, "|O", "<U4", "<c8", "<M8[s]", "|V8", "f4,i4", ""])
    | SCALARS,
    b"shape": st.lists(st.integers(-(2**63), 2**64 - 1) | SCALARS, max_size=10) | SCALARS,
}


@settings(MANY)
@given(st.fixed_dictionaries(FIELDS))
def test_any_claim_about_an_array_is_true_or_a_wire_error(claim):
    try:
        array = unpack(msgpack.packb(claim))
    except WireError:
        return
    assert array.nbytes == len(claim[b"data"])
    assert array.dtype.kind in "biuf"


def array_of(dtype="<f4", shape=(1,), data=b"\0\0\0\0", text=False):
    values = {"__ndarray__": True, "data": data, "dtype": dtype, "shape": list(shape)}
    return msgpack.packb({k if text else k.encode(): v for k, v in values.items()})


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ({"shape": (2**31 - 1, 2**31 - 1)}, r"has 18,446,744,056,529,682,436 bytes; .* holds 4"),
        ({"shape": (2**62,)}, "at most 8 sizes"),
        ({"shape": (-1,)}, "at most 8 sizes"),
        ({"shape": (1,) * 9}, "at most 8 sizes"),
        ({"dtype": "|O"}, "has the dtype '|O'"),
        ({"dtype": "<c8"}, "has the dtype '<c8'"),
        ({"dtype": "<M8[s]"}, "has the dtype"),
        ({"dtype": "f4,f4"}, "has the dtype"),
    ],
)
def test_a_false_claim_is_refused_before_memory_is_allocated(claim, message, text):
    with pytest.raises(WireError, match=message):
        unpack(array_of(**claim, text=text))


def nested(depth):
    return b"\x91" * depth + b"\xc0"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xdc\xff\xff" + b"\x80" * 65535, "65535 exceeds"),  # 64 bytes of memory per byte
        (msgpack.packb([[{}] * 200] * 200), "more than 256 lists and maps"),
        (nested(200_000), "not msgpack within the limits"),
        (b"\xdf\xff\xff\xff\xff", "exceeds max_map_len"),
        (b"\xdd\xff\xff\xff\xff", "exceeds max_array_len"),
        (b"\xc6\xff\xff\xff\xff", "not msgpack"),
        (msgpack.packb("a" * 20_000), "exceeds max_str_len"),
        (msgpack.packb(msgpack.ExtType(5, b"")), "extension 5"),
        (msgpack.packb(msgpack.Timestamp(1)), "exceeds max_ext_len"),
        (b"", "not msgpack"),
        (b"\xc0\xc0", "not msgpack"),
        (b"\xa1\xff", "not msgpack"),
        (msgpack.packb({1: 2}), "not msgpack"),
    ],
)
def test_floods_and_fragments_are_refused(data, message):
    with pytest.raises(WireError, match=message):
        unpack(data)


def test_a_message_beyond_its_limit_is_refused():
    data = pack({"image": np.zeros(1000, np.uint8)})
    with pytest.raises(WireError, match="the limit is 500"):
        unpack(data, Limits(message=500))


def test_objects_are_neither_packed_nor_unpickled():
    for value in (np.array([object()]), np.array(["a"]), np.array([1j]), object()):
        with pytest.raises(TypeError, match="a message cannot hold"):
            pack({"x": value})
    assert not {"pickle", "marshal"} & vars(wire).keys()


# Compressed images


def png(width, height, color=2):
    """Return a PNG of one color, as small as it can be."""

    def chunk(name, data):
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)
    rows = zlib.compress(b"\0" * (height * (1 + 3 * width)) if width * height < 1e6 else b"", 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def image_of(shape, data, kind="png"):
    return pack({"__image__": True, "format": kind, "data": data, "shape": list(shape)})


def test_images_come_back_from_jpeg_and_png():
    pytest.importorskip("PIL")
    image = np.full((24, 32, 3), (200, 30, 90), np.uint8)
    near = unpack(pack(wire.encode_jpeg(image, 95)))
    assert np.abs(near.astype(int) - image).max() < 6
    np.testing.assert_array_equal(unpack(image_of((8, 9, 3), png(9, 8))), np.zeros((8, 9, 3)))


@pytest.mark.parametrize(
    ("shape", "data", "kind", "message"),
    [
        ((40_000, 40_000, 3), png(40_000, 40_000), "png", "at most 4,194,304 pixels"),
        ((8, 8, 3), png(4000, 4000), "png", r"holds 4000 x 4000 RGB"),
        ((8, 8, 3), png(40_000, 40_000), "png", "cannot be decoded"),
        ((8, 9, 3), png(8, 9), "png", "holds 9 x 8"),
        ((8, 8, 3), png(8, 8, color=0), "png", "holds 8 x 8 L"),
        ((8, 8, 3), b"GIF89a", "png", "cannot be decoded"),
        ((8, 8, 3), png(8, 8)[:45], "png", "cannot be decoded"),
        ((8, 8, 3), png(8, 8), "jpeg", "cannot be decoded"),
        ((8, 8, 3), png(8, 8), "gif", "has the format 'gif'"),
        ((8, 8), png(8, 8), "png", r"expected \[h, w, 3\]"),
        ((8, 8, 3), "text", "png", "has the format"),
    ],
)
def test_a_compressed_image_is_measured_before_it_is_decoded(shape, data, kind, message):
    pytest.importorskip("PIL")
    with pytest.raises(WireError, match=message):
        unpack(image_of(shape, data, kind))


def test_the_encodings_of_openpi_and_vla_eval_are_read_with_their_own_code():
    codec = pytest.importorskip("vla_eval.protocol.numpy_codec")
    openpi = pytest.importorskip("openpi_client.msgpack_numpy")
    values = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.full((4, 5, 3), 7, np.uint8),
    }
    theirs = msgpack.packb(values, default=codec.encode_ndarray)
    for data in (openpi.packb(values), theirs):
        read = unpack(data)
        for key, value in values.items():
            np.testing.assert_array_equal(read[key], value)
            assert read[key].dtype == value.dtype
    back = (
        openpi.unpackb(pack(values)),
        msgpack.unpackb(pack(values, text_keys=True), object_hook=codec.decode_ndarray),
    )
    for read in back:
        for key, value in values.items():
            np.testing.assert_array_equal(read[key], value)
    assert unpack(openpi.packb(np.float32(1.5))) == 1.5


def test_the_encoder_reads_no_file():
    """A saved array would hold a pickle; the format has no place for one."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([object()]), allow_pickle=True)
    with pytest.raises(WireError):
        unpack(buffer.getvalue())


def test_the_images_of_a_message_are_measured_together():
    """A megabyte of PNG can hold gigabytes of pixels in many images of an allowed size."""
    pytest.importorskip("PIL")
    one = {"__image__": True, "format": "png", "data": png(9, 8), "shape": [8, 9, 3]}
    limits = wire.Limits(all_pixels=2 * 8 * 9)
    assert len(unpack(pack([one] * 2), limits)) == 2
    with pytest.raises(wire.WireError, match="at most 0 pixels"):
        unpack(pack([one] * 3), limits)
