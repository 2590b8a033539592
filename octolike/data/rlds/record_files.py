"""TFRecord files: listing a directory once, reading by offset with checksums, refusing others.

A TFRecord consists of its length (8 bytes), a checksum (4), the data, and a checksum (4).
TensorFlow verifies both checksums of every record that it reads.
"""

from __future__ import annotations

import os
import re
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tensorflow as tf
import tensorflow_datasets as tfds

from octolike import files
from octolike.errors import DataError

RECORD_HEADER, RECORD_FOOTER = 12, 4
FINGERPRINTS = 2**63 - 1  # number of different content fingerprints
REQUESTS = 32  # parallel requests to a bucket

# TensorFlow's messages quote the record, and decoding them fails if it is not UTF-8.
PARSE_ERRORS = (tf.errors.OpError, UnicodeDecodeError)
# Values by which a bucket's listing shows that a file has changed: the first that it gives.
_VERSIONS = ("generation", "etag", "ETag", "updated", "mtime", "LastModified", "last_modified")


def list_directory(directory: str) -> dict[str, tuple[int, str]]:
    """Return {name: (bytes, time or version of the last change)} of the files in a directory.

    One listing. For a bucket, fsspec gives sizes and versions with it, if its package for the
    bucket is installed (gcsfs for gs://). TensorFlow's listing has names alone: it takes another
    request per file, `REQUESTS` at a time.
    """
    if not files.is_remote(directory):
        with os.scandir(directory) as entries:
            stats = {e.name: e.stat() for e in entries if os.path.isfile(e)}
        return {name: (s.st_size, str(s.st_mtime_ns)) for name, s in stats.items()}
    listing = _fsspec_listing(directory)
    if listing is not None:
        return listing
    names = [name for name in tf.io.gfile.listdir(directory) if not name.endswith("/")]
    with ThreadPoolExecutor(REQUESTS) as pool:
        remote_stats = list(pool.map(tf.io.gfile.stat, [f"{directory}/{name}" for name in names]))
    return {n: (s.length, str(s.mtime_nsec)) for n, s in zip(names, remote_stats, strict=True)}


def graph_record(path: tf.Tensor, offset: tf.Tensor, length: tf.Tensor) -> tf.Tensor:
    """Return the record (scalar string) at a byte offset of a file; graph code.

    The buffer is as large as the record: one request, and no byte of the next record. Raises
    DataLossError for a wrong checksum, InvalidArgumentError for another length.
    """
    variant = tf.raw_ops.TFRecordDatasetV2(
        filenames=tf.reshape(path, [1]),
        compression_type="",
        buffer_size=length + RECORD_HEADER + RECORD_FOOTER,
        byte_offsets=tf.reshape(offset, [1]),
    )
    records = tf.data.experimental.from_variant(variant, tf.TensorSpec((), tf.string))
    record = records.take(1).get_single_element()
    tf.debugging.assert_equal(tf.strings.length(record, "BYTE"), tf.cast(length, tf.int32))
    return record


_read = tf.function(
    graph_record,
    input_signature=[tf.TensorSpec((), t) for t in (tf.string, tf.int64, tf.int64)],
    autograph=False,
)


def content_fingerprint(record: tf.Tensor) -> tf.Tensor:
    """Return a hash of the bytes of a record, int64 scalar: the same on every machine."""
    return tf.strings.to_hash_bucket_fast(record, FINGERPRINTS)


def read_record(path: str, offset: int, length: int, content: int | None = None) -> bytes:
    """Return the record of `length` bytes at byte `offset`; its checksums are verified.

    content: the fingerprint that the record should have. Raises DataError, in one line, if the file
    cannot be read or has changed since it was indexed.
    """
    changed = (
        "the file has changed or is corrupted since it was indexed: restore it, or start again to "
        "index it again"
    )
    try:
        record = _read(path, offset, length)
    except (tf.errors.DataLossError, tf.errors.InvalidArgumentError) as error:
        reason = error_summary(error)
        if reason.startswith("assertion failed") or "was empty" in reason:
            reason = f"no record of {length} bytes there"
        raise DataError(f"{path}, byte {offset}: {reason}; {changed}") from None
    except PARSE_ERRORS as error:
        raise DataError(f"{path} could not be read: {error_summary(error)}") from None
    if content is not None and int(content_fingerprint(record)) != content:
        raise DataError(f"{path}, byte {offset}: another record is there; {changed}")
    return record.numpy()


def check_lengths(path: str, size: int) -> None:
    """Raise DataError for a local file with a record that is longer than the file.

    TensorFlow would allocate memory for it, and end the process.
    """
    if files.is_remote(path):
        return
    offset, count = 0, 0
    with Path(path).open("rb") as file:
        while offset + RECORD_HEADER <= size:
            file.seek(offset)
            (length,) = struct.unpack("<Q", file.read(8))
            offset += RECORD_HEADER + length + RECORD_FOOTER
            if length > size:
                if problem := container_problem(path):
                    raise DataError(f"{path} {problem}")
                raise DataError(
                    f"{path}: record {count} is truncated or corrupted: its header gives {length} "
                    f"bytes, and the file has {size}; copy the file again"
                )
            count += 1


def container_problem(path: str) -> str:
    """Return the name of another format in which a file is written; "" for none that is known."""
    with tf.io.gfile.GFile(path, "rb") as file:
        start = file.read(2)
    if start == b"\x1f\x8b":
        return "is a GZIP-compressed TFRecord file; decompress it: gunzip"
    if len(start) == 2 and start[0] == 0x78 and int.from_bytes(start, "big") % 31 == 0:
        return "is a ZLIB-compressed TFRecord file; write it again without compression"
    return ""


def check_format(info: tfds.core.DatasetInfo, name: str, directory: str) -> None:
    """Raise DataError for a dataset that is not stored as TFRecord."""
    file_format = info.file_format.value if info.file_format else "tfrecord"
    paths = [str(path) for split in info.splits.values() for path in split.filepaths]
    suffixes = re.findall(r"\.(array_record|riegeli|parquet)\b", " ".join(paths))
    if file_format != "tfrecord" or suffixes:
        actual = file_format if file_format != "tfrecord" else suffixes[0]
        raise DataError(
            f"{name}: {directory} is stored as {actual}, and octolike reads tfrecord; convert it "
            f"with: tfds convert_format --from_file_format={actual} --to_file_format=tfrecord "
            f"--dataset_dir={directory} --out_path=DIRECTORY (needs apache-beam)"
        )


def error_summary(error: tf.errors.OpError | UnicodeDecodeError) -> str:
    """Return the sentence of a TensorFlow error, without the names of graph nodes."""
    if isinstance(error, UnicodeDecodeError):
        # The message quotes the record, and TensorFlow fails to decode it.
        return "the record cannot be parsed"
    lines = [x.strip() for x in error.message.splitlines()]
    if lines and lines[0] == "Graph execution error:":  # then Python's stack, then the sentence
        lines = [x for x in lines if x and not x.startswith(("[[", "Detected at", "File "))][-1:]
    sentence = re.sub(r"^.*\}\} |^.*Iterator::[\w:]+: | \[Op:\w+\].*$", "", (lines or [""])[0])
    return sentence[:300]


def one_line(error: BaseException) -> str:
    """Return the first line of a library's error, at most 300 characters."""
    text = next(iter(str(error).strip().splitlines()), "")
    return (text or type(error).__name__)[:300]


def _fsspec_listing(directory: str) -> dict[str, tuple[int, str]] | None:
    """Return the listing of a bucket's directory by fsspec; None if it cannot list it."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(directory)
        system.invalidate_cache(path)
        entries = system.ls(path, detail=True)
        return {
            entry["name"].rpartition("/")[2]: (
                int(entry["size"]),
                str(next((entry[k] for k in _VERSIONS if entry.get(k)), "")),
            )
            for entry in entries
            if entry["type"] == "file"
        }
    except Exception:  # not installed, no credentials: TensorFlow may have them
        return None
