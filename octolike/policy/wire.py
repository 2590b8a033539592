"""Messages between a robot and a policy server: msgpack with numpy arrays, decoded within limits.

Two encodings of an array are read, that of openpi and that of vla-eval; they differ in the type of
the keys. `pack` writes openpi's by default:

    {b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [4, 7]}
    {"__ndarray__": True, "data": bytes, "dtype": "<f4", "shape": [4, 7]}
    {"__image__": True, "format": "jpeg", "data": bytes, "shape": [256, 256, 3]}

A decoder must not trust its input. The claims of a message are checked before memory is allocated
for them: dtypes other than bool, integers and floats are refused (so nothing is ever unpickled), a
shape must fit the bytes that came with it, and containers and pixels are counted.

Only numpy and msgpack are imported, for Python 3.10 and later; images in JPEG or PNG need pillow.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import msgpack
import numpy as np

DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
MAX_RANK = 8
IMAGE_FORMATS = ("raw", "jpeg", "png")


class WireError(ValueError):
    """A message that cannot be decoded, or that exceeds a limit."""


class Limits(NamedTuple):
    """The largest contents of a message that is decoded.

    message: bytes; containers: lists and maps, arrays included; entries: of one list or map; text:
    bytes of one string; pixels: of one compressed image; all_pixels: of all of them together.
    """

    message: int = 16 << 20
    containers: int = 256
    entries: int = 512
    text: int = 16 << 10
    pixels: int = 4 << 20
    all_pixels: int = 16 << 20


def pack(message: Any, text_keys: bool = False) -> bytes:
    """Return a message as bytes; text_keys: encode arrays as vla-eval does, not as openpi does.

    Raises TypeError for an object that msgpack cannot encode, and for arrays of objects; ValueError
    for an integer of more than 64 bits.
    """
    key: Callable[[str], Any] = str if text_keys else str.encode
    return msgpack.packb(message, default=lambda x: _encode(x, key))


def _encode(x: Any, key: Callable[[str], Any]) -> Any:
    if isinstance(x, np.ndarray) and DTYPE.fullmatch(x.dtype.str):
        values = {"data": x.tobytes(), "dtype": x.dtype.str, "shape": list(x.shape)}
        return {key("__ndarray__"): True, **{key(k): v for k, v in values.items()}}
    if isinstance(x, np.generic) and DTYPE.fullmatch(x.dtype.str):
        return x.item()
    if isinstance(x, int):
        raise ValueError("a message cannot hold an integer of more than 64 bits")
    raise TypeError(f"a message cannot hold {getattr(x, 'dtype', None) or type(x).__name__}")


def encode_jpeg(image: np.ndarray, quality: int) -> dict[bytes, Any]:
    """Return a uint8 image [h, w, 3] as a compressed entry of a message."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=quality)
    return {
        b"__image__": True,
        b"format": "jpeg",
        b"data": buffer.getvalue(),
        b"shape": list(image.shape),
    }


def unpack(data: bytes, limits: Limits = Limits()) -> Any:  # noqa: B008  # immutable
    """Return the message in `data`; its arrays are read-only views of it.

    Raises WireError for anything else than one complete message within the limits.
    """
    if len(data) > limits.message:
        raise WireError(f"the message has {len(data):,} bytes; the limit is {limits.message:,}")
    counted, pixels = 0, 0

    def count() -> None:
        nonlocal counted
        counted += 1
        if counted > limits.containers:
            raise WireError(f"the message has more than {limits.containers} lists and maps")

    def read_map(x: dict[Any, Any]) -> Any:
        nonlocal pixels
        count()
        remaining = min(limits.pixels, limits.all_pixels - pixels)
        value = _decode(x, limits._replace(pixels=remaining))
        if _is_compressed(x):
            pixels += value.size // 3
        return value

    def read_list(x: list[Any]) -> list[Any]:
        count()
        return x

    try:
        return msgpack.unpackb(
            data,
            object_hook=read_map,
            list_hook=read_list,
            ext_hook=_refuse_extension,
            max_str_len=limits.text,
            max_bin_len=limits.message,
            max_array_len=limits.entries,
            max_map_len=limits.entries,
            max_ext_len=0,
        )
    except WireError:
        raise
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        reason = str(error) or type(error).__name__
        raise WireError(f"the message is not msgpack within the limits: {reason[:200]}") from error


def _is_compressed(x: dict[Any, Any]) -> bool:
    """Return whether a map is a compressed image."""
    is_image = "__image__" in x or b"__image__" in x
    return is_image and "raw" not in (x.get("format"), x.get(b"format"))


def _refuse_extension(code: int, data: bytes) -> Any:
    raise WireError(f"the message has the msgpack extension {code}; expected none")


def _decode(x: dict[Any, Any], limits: Limits) -> Any:
    """Return the array of an encoded one; other maps as they are."""
    for mark, read in (
        ("__ndarray__", _read_array),
        ("__npgeneric__", _read_scalar),
        ("__image__", _read_image),
    ):
        for key in (mark, mark.encode()):
            if key in x:
                values = {k.decode() if isinstance(k, bytes) else k: v for k, v in x.items()}
                return read(values, limits)
    return x


def _read_array(x: dict[str, Any], limits: Limits) -> np.ndarray:
    data, dtype, shape = x.get("data"), _dtype(x.get("dtype")), _shape(x.get("shape"))
    expected = math.prod(shape) * dtype.itemsize
    if not isinstance(data, bytes) or len(data) != expected:
        size = len(data) if isinstance(data, bytes) else type(data).__name__
        raise WireError(
            f"an array {dtype} {list(shape)} has {expected:,} bytes; the message holds {size}"
        )
    return np.frombuffer(data, dtype).reshape(shape)


def _read_scalar(x: dict[str, Any], limits: Limits) -> Any:
    data, dtype = x.get("data"), _dtype(x.get("dtype"))
    if not isinstance(data, (bool, int, float)):
        raise WireError(f"a number of type {dtype} holds {type(data).__name__}")
    return dtype.type(data)


def _read_image(x: dict[str, Any], limits: Limits) -> np.ndarray:
    """Return uint8 [h, w, 3]; the size is checked before the pixels are decoded."""
    kind, data, shape = x.get("format"), x.get("data"), _shape(x.get("shape"))
    if kind not in IMAGE_FORMATS or not isinstance(data, bytes):
        raise WireError(
            f"an image has the format {kind!r:.40}; expected {', '.join(IMAGE_FORMATS)}"
        )
    if kind == "raw":
        return _read_array(x, limits)
    if len(shape) != 3 or shape[2] != 3 or math.prod(shape[:2]) > limits.pixels:
        raise WireError(
            f"an image has the shape {list(shape)}; expected [h, w, 3] with at most "
            f"{limits.pixels:,} pixels (that of one, or the remainder of all images)"
        )
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise WireError(
            f"the image is a {kind}, and pillow is not installed here: pip install pillow, or send "
            "raw images"
        ) from error
    try:
        image = Image.open(io.BytesIO(data), formats=(kind.upper(),))
        if image.size != (shape[1], shape[0]) or image.mode != "RGB":
            raise WireError(
                f"an image {list(shape)} holds {image.size[1]} x {image.size[0]} {image.mode} "
                "pixels; expected RGB of that shape"
            )
        return np.asarray(image)
    except WireError:
        raise
    except Exception as error:  # pillow raises OSError, SyntaxError, struct.error, …
        raise WireError(f"a {kind} image cannot be decoded") from error


def _dtype(text: Any) -> np.dtype:
    if not isinstance(text, str) or not DTYPE.fullmatch(text):
        raise WireError(
            f"an array has the dtype {text!r:.40}; expected bool, integers or floats, such as '<f4'"
        )
    return np.dtype(text)


def _shape(value: Any) -> tuple[int, ...]:
    is_shape = isinstance(value, list) and len(value) <= MAX_RANK
    if not is_shape or not all(type(n) is int and 0 <= n < 2**31 for n in value):
        raise WireError(f"an array has the shape {value!r:.80}; expected at most {MAX_RANK} sizes")
    return tuple(value)
