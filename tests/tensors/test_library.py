"""Compiled libraries: a cache that others can write to is not used, and a damaged library is made anew."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cenote.tensors import library

pytestmark = pytest.mark.full  # compilers in processes of their own
GOOD = 'extern "C" int number() { return 1; }'


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    file = folder / "number.cpp"
    file.write_text(GOOD)
    return file


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the user's own, in `home/cenote`."""
    folder = tmp_path / "home"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def number(source: Path) -> tuple[int, Path]:
    """The answer of the library of `source`, and where it was loaded from."""
    with library.compiled(source) as file:
        return ctypes.CDLL(str(file)).number(), file


def test_a_library_is_built_once(source: Path, home: Path) -> None:
    (_, first), (_, second) = number(source), number(source)
    assert first == second
    assert [path.name for path in (home / "cenote").iterdir()] == [first.name]
    assert (home / "cenote").stat().st_mode & 0o777 == 0o700
    assert first.stat().st_mode & 0o077 == 0


def open_folder(home: Path) -> None:
    (home / "cenote").mkdir()
    (home / "cenote").chmod(0o777)


def open_to_the_group(home: Path) -> None:
    (home / "cenote").mkdir()
    os.chown(home / "cenote", -1, 12345)
    (home / "cenote").chmod(0o770)


def open_parent(home: Path) -> None:
    home.chmod(0o777)


def of_another(home: Path) -> None:
    (home / "cenote").mkdir()
    os.chown(home / "cenote", 12345, -1)


def parent_of_another(home: Path) -> None:
    os.chown(home, 12345, -1)


def link_into_an_open_folder(home: Path) -> None:
    target = home / "open"
    (target / "cenote").mkdir(parents=True)
    target.chmod(0o777)
    (home / "cenote").symlink_to("open/cenote")


def link_of_another(home: Path) -> None:
    (home / "elsewhere").mkdir()
    (home / "cenote").symlink_to("elsewhere")
    os.lchown(home / "cenote", 12345, -1)


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another user")


@pytest.mark.parametrize(
    "spoil",
    [
        open_folder,
        open_parent,
        link_into_an_open_folder,
        *[
            pytest.param(spoil, marks=needs_root)
            for spoil in (open_to_the_group, of_another, parent_of_another, link_of_another)
        ],
    ],
)
def test_a_folder_that_others_can_change_is_not_used(
    spoil: Callable[[Path], None], source: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The library planted there has the name that a build would take, and is never loaded."""
    spoil(home)
    planted = library.build(home / "cenote" if (home / "cenote").is_dir() else home, source)
    answer, file = number(source)
    assert answer == 1
    assert home not in file.parents
    assert file != planted
    assert not file.exists(), "the private folder goes once the library is loaded"
    assert "compiled kernels are not kept, and compiled at every start" in caplog.text


def test_a_sticky_parent_keeps_entries_apart(source: Path, home: Path) -> None:
    home.chmod(0o1777)
    _, file = number(source)
    assert file.parent == home / "cenote"


def test_a_link_of_the_users_own_to_a_safe_folder_is_followed(source: Path, home: Path) -> None:
    (home / "disk").mkdir(mode=0o700)
    (home / "cenote").symlink_to("disk")
    _, file = number(source)
    assert (home / "disk" / file.name).is_file()


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def replaced_by_a_link(file: Path) -> None:
    planted = file.with_suffix(".planted")
    file.rename(planted)
    file.symlink_to(planted)


def opened_to_all(file: Path) -> None:
    file.chmod(0o777)


def given_away(file: Path) -> None:
    os.chown(file, 12345, -1)


def a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize(
    "spoil",
    [cut_short, emptied, replaced_by_a_link, opened_to_all, a_pipe, pytest.param(given_away, marks=needs_root)],
)
def test_a_damaged_or_foreign_library_is_built_once_more(
    spoil: Callable[[Path], None], source: Path, home: Path
) -> None:
    with library.compiled(source) as file:
        spoil(file)
    with library.compiled(source) as again:
        assert again == file
        assert again.is_file()
        assert not again.is_symlink()
        assert again.stat().st_mode & 0o777 == 0o700
        assert again.stat().st_uid == os.getuid()
        assert ctypes.CDLL(str(again)).number() == 1


def test_there_is_no_library_where_no_folder_is_safe(
    source: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.chmod(0o777)
    monkeypatch.setattr("tempfile.tempdir", str(home))
    with pytest.raises(PermissionError, match="other users can write to"), library.compiled(source):
        pass


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/cenote"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/h"}, "/h/.cache/cenote"),
        ({"XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/cenote"),
        ({"XDG_CACHE_HOME": "", "HOME": ""}, None),
    ],
)
def test_the_place_of_the_cache(
    variables: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if expected is None:
        import pwd

        expected = f"{pwd.getpwuid(os.getuid()).pw_dir}/.cache/cenote"
    assert library.cache() == Path(expected)


def test_the_variable_may_name_arguments(source: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "env c++ -DUNUSED='1 2'")
    assert number(source)[0] == 1
