"""A licence is what the source itself states, or not known, with the reason."""

import tracemalloc
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import gguf
import huggingface_hub
import pytest

from pipeline.core import records
from pipeline.export import licence


def wheel(metadata: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> licence.Stated:
    """What is stated of a wheel with this metadata, which lies in the cache."""
    made = folder / "toy-1.0-py3-none-any.whl"
    with ZipFile(made, "w") as archive:
        archive.writestr("toy/data.csv", "a\n")
        archive.writestr("toy-1.0.dist-info/METADATA", f"Metadata-Version: 2.4\nName: toy\n{metadata}\n")
    sha256 = records.sha256_file(made)
    monkeypatch.setenv("LORA_REPRO_CACHE", str(folder / "cache"))
    kept = folder / "cache" / "wheels" / sha256 / made.name
    kept.parent.mkdir(parents=True)
    made.rename(kept)
    return licence.stated("pip:toy==1.0/toy", sha256, kind="dataset", key="data")


@pytest.mark.parametrize(
    ("metadata", "name"),
    [
        ("License-Expression: BSD-3-Clause\nLicense: other", "BSD-3-Clause"),
        ("License: MIT\n\nThis is License: GPL", "MIT"),
        ("Classifier: License :: OSI Approved :: MIT License", "MIT License"),
        ("Classifier: License :: OSI Approved :: A\nClassifier: License :: OSI Approved :: B", None),
        (f"License: {'Permission is hereby granted ' * 9}", None),
        ("Summary: toy", None),
    ],
)
def test_a_wheel_states_it_in_its_metadata(
    metadata: str, name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = wheel(metadata, tmp_path, monkeypatch)
    assert found.name == name
    assert str(found) == (f"{name} (metadata of the wheel)" if name else "not known (the wheel's metadata name none)")
    assert found.identifier == (name.lower() if name else "unknown")


@pytest.mark.parametrize("stated", [True, False])
def test_a_gguf_file_states_it_in_its_header(stated: bool, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    if stated:
        writer.add_license("apache-2.0")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = licence.stated(str(file), records.sha256_file(file), kind="model", key="model")
    assert found == (
        licence.Stated("apache-2.0", "general.license of the GGUF file")
        if stated
        else licence.Stated(None, "the source states none")
    )


def test_a_folder_states_it_in_its_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: llama3.2\n---\n# A model\n")
    found = licence.stated(str(tmp_path), records.sha256_tree(tmp_path), kind="model", key="model")
    assert found == licence.Stated("llama3.2", "README.md of the folder")
    (tmp_path / "README.md").write_text("---\nlicense: [a, {\n---\n")
    assert licence.stated(str(tmp_path), records.sha256_tree(tmp_path), kind="model", key="model").name is None


def test_a_repository_states_it_in_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(*arguments: Any, **options: Any) -> str:
        asked.append((arguments, options))
        (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
        return str(tmp_path / "README.md")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    revision = "0123456789" * 4
    found = licence.stated(f"hf:owner/data@{revision}/part", None, kind="dataset", key="data")
    assert found == licence.Stated("mit", "README.md of the repository")
    assert asked == [(("owner/data", "README.md"), {"repo_type": "dataset", "revision": revision})]

    def offline(*_: Any, **__: Any) -> str:
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    found = licence.stated(f"hf:owner/data@{revision}", None, kind="dataset", key="data")
    assert str(found) == "not known (the hub could not be asked: ConnectionError)"


def test_a_source_that_is_gone_is_not_known(tmp_path: Path) -> None:
    found = licence.stated(str(tmp_path / "gone"), "0" * 64, kind="model", key="model")
    assert found.name is None
    assert found.where.startswith("the source cannot be read here: model.source = ")


def test_metadata_that_would_fill_the_memory_are_read_to_their_first_part(tmp_path: Path) -> None:
    with ZipFile(tmp_path / "toy.whl", "w", ZIP_DEFLATED) as made:
        made.writestr("toy-1.0.dist-info/METADATA", "License: MIT\n\n" + "x" * 2**27)
    tracemalloc.start()
    try:
        with ZipFile(tmp_path / "toy.whl") as archive:
            assert licence._of_wheel(archive) == "MIT"
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()
