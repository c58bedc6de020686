"""The project that owns records and sources, wherever an experiment runs."""

from pathlib import Path

import pytest

from pipeline.core import paths


class TestMainRepository:
    @pytest.fixture
    def main(self, tmp_path: Path) -> Path:
        (tmp_path / "main" / ".dvc" / "tmp" / "exps" / "standalone" / "copy" / ".dvc").mkdir(parents=True)
        (tmp_path / "main" / "sub").mkdir()
        (tmp_path / "other" / ".dvc").mkdir(parents=True)
        return (tmp_path / "main").resolve()

    @pytest.mark.parametrize("where", [".", "sub", ".dvc/tmp/exps/standalone/copy"])
    def test_dvc_names_it(self, main: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(main / where)
        monkeypatch.setenv("DVC_ROOT", str(main))
        assert paths.main_repository() == main

    @pytest.mark.parametrize("where", [".", "sub"])
    def test_without_dvc_it_is_the_nearest_project(
        self, main: Path, where: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(main / where)
        assert paths.main_repository() == main

    @pytest.mark.parametrize("stale", ["../other", "../gone", "sub"])
    def test_a_stale_name_is_not_believed(self, main: Path, stale: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(main / "sub")
        monkeypatch.setenv("DVC_ROOT", str(main / stale))
        assert paths.main_repository() == main

    def test_outside_any_project_it_is_here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert paths.main_repository() == tmp_path.resolve()

    def test_a_search_names_it_to_its_trials(self, main: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        trial = main / ".sweeps" / "example" / "trial-1"
        (trial / ".dvc").mkdir(parents=True)
        monkeypatch.chdir(trial)
        assert paths.main_repository() == trial
        monkeypatch.setenv(paths.MAIN, str(main))
        assert paths.main_repository() == main
        monkeypatch.setenv(paths.MAIN, str(main.parent / "other"))
        assert paths.main_repository() == trial
