"""What DVC draws: tables that say what the comparison says, templates that draw all of it, a page without a network."""

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.commands import viewer
from pipeline.core import contracts, paths, records
from pipeline.core.contracts import Step, Validation
from pipeline.core.errors import UserError
from pipeline.report import curves, dvc_plots
from pipeline.score import side_by_side
from tests import ROOT
from tests.made.clone import entered
from tests.made.comparison import several_seeds
from tests.made.experiment import compared, examples, plant
from tests.made.records import training

DECLARED: dict[str, dict[str, Any]] = {
    path: facts
    for one in YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"]["compare"]["plots"]
    for path, facts in one.items()
}


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def train(seed: int, steps: int) -> list[float]:
    """Write a training's curves as the stage `train` does; the loss of each step."""
    losses = [3 + seed - step / steps for step in range(steps)]
    curve = [Step(step, 0.0, loss, 1e-3, 1.0, 12, 900) for step, loss in enumerate(losses)]
    records.write_text(paths.training_log(seed), contracts.curve_text(curve))
    validation = [Validation(0, 4.0 + seed), Validation(steps, 3.0 + seed)]
    contracts.write(paths.training_summary(seed), training(seed, validation=validation))
    return losses


def write(*seeds: int) -> None:
    """Write the tables as the stage `compare` does."""
    dvc_plots.write(compared(*seeds), side_by_side.read(seeds), curves.read(seeds))


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tables of a comparison with two seeds, and DVC's templates."""
    monkeypatch.chdir(tmp_path)
    plant(examples(), {"base": 0.3, "tuned-17": 0.8, "tuned-18": 0.7})
    for seed in (17, 18):
        train(seed, 5)
    write(17, 18)
    return tmp_path


@pytest.mark.usefixtures("made")
def test_the_intervals_are_those_of_the_comparison() -> None:
    comparison = compared(17, 18)
    rows = {(row["metric"], row["what"]): row for row in table(paths.PLOT_INTERVALS)}
    assert len(rows) == 3 * len(comparison.results)
    one = comparison.results["rouge2"]
    for what, interval in (("base", one.base), ("tuned", one.tuned), ("tuned − base", one.deciding)):
        row = rows["ROUGE-2", what]
        assert [float(row[key]) for key in ("value", "low", "high")] == [interval.value, interval.low, interval.high]


def test_the_difference_has_the_interval_that_decides() -> None:
    rows = list(dvc_plots._intervals(several_seeds()))
    [difference] = [row for row in rows if (row["metric"], row["what"]) == ("ROUGE-2", "tuned − base")]
    assert (difference["low"], difference["high"]) == (-0.1, 5.5)


@pytest.mark.usefixtures("made")
def test_the_curves_hold_every_step_and_validation_of_every_seed() -> None:
    rows = table(paths.PLOT_CURVES)
    assert [(row["split"], int(row["step"])) for row in rows if row["seed"] == "18"] == [
        *(("training", step) for step in range(5)),
        ("validation", 0),
        ("validation", 5),
    ]
    drawn = [float(row["loss"]) for row in rows if (row["seed"], row["split"]) == ("17", "training")]
    assert drawn == train(17, 5)
    assert [float(row["loss"]) for row in rows if (row["seed"], row["split"]) == ("18", "validation")] == [22, 21]


def test_a_long_training_is_drawn_as_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    losses = train(1, 2 * curves.POINTS + 1)
    [curve] = curves.read([1])
    assert len(curve.training) <= curves.POINTS
    assert curve.training[1] == pytest.approx((4, sum(losses[3:6]) / 3))
    assert curve.training[-1] == pytest.approx((799, sum(losses[798:801]) / 3))


@pytest.mark.usefixtures("made")
def test_the_lengths_are_shares_of_each_kind_of_text() -> None:
    found: dict[str, float] = {}
    for row in table(paths.PLOT_LENGTHS):
        found[row["texts"]] = found.get(row["texts"], 0.0) + float(row["share"])
    assert found == {name: pytest.approx(1) for name in ("references", "base", "tuned")}
    assert {row["words"] for row in table(paths.PLOT_LENGTHS)} == {"8"}


@pytest.mark.usefixtures("made")
def test_equal_results_give_equal_bytes() -> None:
    files = [Path(path) for path in DECLARED]
    assert sorted(files) == sorted([paths.PLOT_INTERVALS, paths.PLOT_CURVES, paths.PLOT_LENGTHS])
    before = [path.read_bytes() for path in files]
    write(17, 18)
    assert [path.read_bytes() for path in files] == before


def drawn(name: str, revisions: list[str]) -> str:
    """The SVG that DVC's renderer and Vega-Lite make of a declared plot."""
    import vl_convert
    from dvc_render.vega import VegaRenderer

    facts = DECLARED[name]
    rows = [{**row, "rev": revision} for revision in revisions for row in table(Path(name))]
    keys = {key: facts[key] for key in ("x", "y", "title", "template")}
    renderer = VegaRenderer(rows, name, template_dir=str(ROOT / ".dvc" / "plots"), **keys)
    return str(vl_convert.vegalite_to_svg(json.dumps(renderer.get_filled_template())))


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize("revisions", [["workspace"], ["workspace", "HEAD"]], ids=["show", "diff"])
def test_every_row_is_drawn(revisions: list[str]) -> None:
    assert len(DECLARED) == 3
    svg = drawn("reports/plots/intervals.csv", revisions)
    points = re.findall(r'aria-roledescription="point"', svg)
    assert len(points) == len(revisions) * len(table(paths.PLOT_INTERVALS))
    assert "base" in svg
    assert "tuned" in svg
    svg = drawn("reports/plots/curves.csv", revisions)
    assert svg.count('aria-roledescription="line mark"') == len(revisions) * 4
    svg = drawn("reports/plots/lengths.csv", revisions)
    assert svg.count('aria-roledescription="bar"') == len(revisions) * 3


class Addresses(HTMLParser):
    """Collects all that a page would load; what is inside of a script is none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, _: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href")]


def addresses(page: str) -> list[str]:
    parser = Addresses()
    parser.feed(page)
    return parser.found


@pytest.mark.slow
class TestPage:
    @pytest.fixture
    def project(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A project of DVC's with the tables and templates, and no stage that has run."""
        entered(tmp_path, monkeypatch)
        shutil.copytree(ROOT / ".dvc" / "plots", ".dvc/plots")
        (Path(".dvc") / "config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
        return tmp_path

    def test_it_holds_its_scripts(self, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
        viewer.prepare()
        assert "needs no network" in capsys.readouterr().out
        page = viewer.PAGE.read_text(encoding="utf-8")
        assert addresses(page) == []
        assert [page.count(word) for word in ("{plot_divs}", "{refresh_tag}", "{scripts}", "</script>")] == [1, 1, 0, 1]
        before = {path: path.stat().st_mtime_ns for path in (viewer.PAGE, viewer.CONFIG)}
        viewer.prepare()
        assert capsys.readouterr().out == ""
        assert {path: path.stat().st_mtime_ns for path in before} == before
        viewer.PAGE.unlink()
        viewer.prepare()
        assert viewer.PAGE.read_text(encoding="utf-8") == page
        ignored = (ROOT / ".dvc" / ".gitignore").read_text().split()
        assert {f"/{viewer.PAGE.name}", f"/{viewer.CONFIG.name}"} <= set(ignored)
        assert project == Path.cwd()

    @pytest.mark.usefixtures("project")
    def test_another_packages_page_is_made_anew(self, monkeypatch: pytest.MonkeyPatch) -> None:
        viewer.prepare()
        before = viewer.PAGE.read_text(encoding="utf-8")
        monkeypatch.setattr(viewer, "version", lambda _: "99")
        viewer.prepare()
        assert "vl-convert-python 99" in viewer.PAGE.read_text(encoding="utf-8")
        assert viewer.PAGE.read_text(encoding="utf-8") != before

    @pytest.mark.usefixtures("project")
    def test_a_page_of_the_users_own_stays(self, capsys: pytest.CaptureFixture[str]) -> None:
        viewer.CONFIG.write_text("[plots]\n    html_template = mine.html\n")
        viewer.prepare()
        assert "its own plots.html_template, mine.html: it stays" in capsys.readouterr().out
        assert not viewer.PAGE.exists()
        viewer.CONFIG.write_text("plots\n")
        with pytest.raises(UserError, match=r"config.local cannot be read"):
            viewer.prepare()

    def test_outside_of_a_project_it_says_so(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=r".dvc is missing: run this in the project folder"):
            viewer.prepare()

    @pytest.mark.usefixtures("project")
    def test_dvc_draws_on_it_and_without_it_on_its_own(self) -> None:
        plant(examples(), {"base": 0.3, "tuned-17": 0.8})
        train(17, 5)
        write(17)
        declared = [{path: {k: v for k, v in facts.items() if k != "cache"}} for path, facts in DECLARED.items()]
        Path("dvc.yaml").write_text(json.dumps({"plots": declared}))
        page = Path("dvc_plots") / "index.html"
        for prepared in (False, True):
            if prepared:
                viewer.prepare()
            subprocess.run(["dvc", "plots", "show", "-q"], check=True)
            text = page.read_text(encoding="utf-8")
            specifications = [json.loads(found) for found in re.findall(r"var spec = (.*);", text)]
            assert sorted(len(one["data"]["values"]) for one in specifications) == sorted(
                len(table(Path(path))) for path in DECLARED
            )
            assert all(address.startswith("https://cdn.") for address in addresses(text))
            assert bool(addresses(text)) is not prepared
