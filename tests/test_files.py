"""Files that are replaced whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_gpulab.files import replacing


def write(path: Path, text: bytes) -> None:
    with replacing(path) as file:
        file.write(text)


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write(path, b"before")
    write(path, b"after")
    assert path.read_bytes() == b"after"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("method", ["replace", "chmod"])
def test_an_interruption_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    path = tmp_path / "record.json"
    write(path, b"before")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(path, b"after")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        write(tmp_path / "nowhere" / "record.json", b"text")
