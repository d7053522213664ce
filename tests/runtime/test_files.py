"""Argument parsing, atomic writes and the settings of a folder of results."""

import argparse
import json
import shutil
import socket

import numpy as np
import pytest
from conftest import file_limit, locked
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import files
from runtime.command_line import ArgumentParser, number
from runtime.errors import UserError
from runtime.files import atomic_write, check_settings, lock_folder, remove_leftovers, write_array


@given(st.text(max_size=12))
def test_number_flags_accept_only_numbers_within_bounds(text):
    for kind, low, high in ((int, 1, 1000), (float, 0, 1)):
        try:
            value = number(kind, low, high)(text)
        except argparse.ArgumentTypeError:
            pass
        else:
            assert isinstance(value, kind)
            assert low <= value <= high


def test_a_number_without_bounds_has_none_in_its_error():
    with pytest.raises(argparse.ArgumentTypeError, match=r"^expected a finite number, got 'nan'$"):
        number(float)("nan")


@given(st.lists(st.sampled_from(["--a", "--b", "1", "-1", "nan", "1e9", "--", "x"]), max_size=6))
@settings(deadline=None)
def test_the_parser_returns_values_or_exits_with_code_2(flags):
    parser = ArgumentParser(prog="p")
    parser.add_argument("--a", type=number(int, 1, 9), default=1)
    parser.add_argument("--b", type=number(float, 0, above=True))
    try:
        args = parser.parse_args(flags)
    except SystemExit as end:
        assert end.code == 2
    else:
        assert 1 <= args.a <= 9
        assert args.b is None or args.b > 0


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "folder" / "file"
    with atomic_write(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise RuntimeError
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("size", [10, 500, 2000, 100_000])
def test_an_array_that_does_not_fit_on_the_disk(tmp_path, size):
    """The limit cuts the last bytes off, which np.save would not report."""
    path, array = tmp_path / "a.npy", np.arange(size, dtype=np.float32).reshape(2, -1).T
    write_array(path, array)
    assert np.array_equal(np.load(path), array)
    length = path.stat().st_size
    path.unlink()
    for missing in (1, 40):
        with file_limit(length - missing), pytest.raises(OSError, match="File too large"):
            write_array(path, array)
        assert not list(tmp_path.iterdir())


def test_temporary_files_of_killed_writers_are_removed(tmp_path):
    for name in ("file", ".file.123.tmp"):
        (tmp_path / name).write_text("content")
    remove_leftovers(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_locked_until_its_writer_ends(tmp_path):
    folder = tmp_path / "outputs/run"
    with locked(folder) as writer:
        message = f"process {writer.pid} on {socket.gethostname()}: end that run, or choose another --prefix"
        with pytest.raises(UserError, match=message):
            lock_folder(folder, "--prefix")
        writer.kill()
        writer.join()
        lock_folder(folder, "--prefix")
        files.unlock_folders()
        assert folder.is_dir(), "only a folder that was created for the lock is removed"
    shutil.rmtree(folder.parent)
    for content in ((), ("file",)):
        lock_folder(folder, "--prefix")
        for name in content:
            (folder / name).touch()
        files.unlock_folders()
        assert sorted(folder.glob("*")) == [folder / name for name in content]
        assert folder.parent.exists() == bool(content)


def test_results_of_other_settings_are_refused(tmp_path):
    record = tmp_path / "settings.json"
    record.write_text(json.dumps({"seed": 0, "path": "a"}))
    check_settings(record, {"seed": 0, "path": "b"}, "choose another --name", ignored=("path",))
    with pytest.raises(UserError, match="seed=0, not 1: remove it or choose another --name"):
        check_settings(record, {"seed": 1, "path": "a"}, "choose another --name")
    check_settings(record, {"seed": 0, "path": "a", "mirror": True}, "choose another --name", added=("mirror", "seed"))
    with pytest.raises(UserError, match="seed=0, not 1"):
        check_settings(record, {"seed": 1, "path": "a"}, "choose another --name", added=("mirror", "seed"))
    with pytest.raises(UserError, match="mirror=None, not True"):
        check_settings(record, {"seed": 0, "path": "a", "mirror": True}, "choose another --name")
