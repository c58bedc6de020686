"""`dvc.yaml` and `claims/dvc.yaml` against the code: what a stage imports is what it depends on; what it reads is what
it declares."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.core import params, records
from pipeline.model import resume
from tests import ROOT

STAGES: dict[str, Any] = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"]
TEMPLATES: dict[str, Any] = YAML(typ="safe", pure=True).load((ROOT / "claims/dvc.yaml").read_text())["stages"]
CLAIMS: dict[str, Any] = {name: template.get("do", template) for name, template in TEMPLATES.items()}
COMPUTES = {"quantize", "contamination", "train", "infer", "infer-tuned", "infer-unquantized", "infer-shots", "forget"}


def command(definition: dict[str, Any]) -> str:
    return str(definition.get("cmd", ""))


def script(definition: dict[str, Any]) -> Path:
    """The file behind `python -m stages.<script> ...`."""
    start, module = command(definition).split()[:2], command(definition).split()[2]
    assert start == ["python", "-m"], "a queued experiment would import the main workspace's code"
    return Path(*module.split(".")).with_suffix(".py")


def closure(start: Path) -> set[str]:
    """Every file of this project that `start` imports, directly or not, inside functions or not."""
    found: set[str] = set()
    queue = [start]
    while queue:
        path = queue.pop()
        if path.as_posix() in found:
            continue
        found.add(path.as_posix())
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            else:
                continue
            for module in modules:
                file = Path(*module.split(".")).with_suffix(".py")
                if module.split(".")[0] in ("pipeline", "stages", "claims") and (ROOT / file).is_file():
                    queue.append(file)
    return found


def code(definition: dict[str, Any]) -> list[str]:
    """The files and folders of this project's code that a stage declares."""
    mine = [dep for dep in definition["deps"] if dep.startswith(("pipeline/", "stages/", "claims/"))]
    return [dep for dep in mine if dep.endswith(".py") or (ROOT / dep).is_dir()]


def holds(declared: str, file: str) -> bool:
    return file == declared or file.startswith(f"{declared}/")


@pytest.mark.parametrize("definition", [*STAGES.values(), *CLAIMS.values()], ids=[*STAGES, *CLAIMS])
def test_a_stage_depends_on_what_it_imports_and_on_no_other_code(definition: dict[str, Any]) -> None:
    imported, declared = closure(script(definition)), code(definition)
    assert sorted(file for file in imported if not any(holds(one, file) for one in declared)) == []
    assert [one for one in declared if not any(holds(one, file) for file in imported)] == []


MAY_IMPORT = {
    "core": set(),
    "sources": {"core"},
    "prepare": {"core", "sources", "score"},
    "model": {"core"},
    "gguf": {"core", "model"},
    "quantize": {"core", "model"},
    "prompts": {"core", "model"},
    "fetch": {"core", "sources", "model", "gguf"},
    "lora": {"core", "model"},
    "infer": {"core", "model", "gguf"},
    "contamination": {"core", "model"},
    "probes": {"core", "sources", "prepare", "model"},
    "forget": {"core", "sources", "model", "lora", "probes"},
    "score": {"core"},
    "record": {"core", "score"},
    "report": {"core", "score", "record"},
    "check": {"core", "sources", "prepare", "fetch", "model", "probes", "score", "record"},
    "search": {"core", "check", "record"},
    "export": {"core", "sources", "fetch", "model", "gguf", "lora", "infer", "score", "report", "record"},
    "commands": {
        "core",
        "check",
        "sources",
        "fetch",
        "model",
        "forget",
        "lora",
        "score",
        "report",
        "record",
        "search",
        "export",
    },
}
"""What each room says of itself, and the modules beside them. No room is imported by one that it imports."""


def arrows() -> dict[str, set[str]]:
    """The modules of this package that each of them imports, at its top or inside functions."""
    files = sorted((ROOT / "pipeline").rglob("*.py"))
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files if path.stem != "__init__"}
    found: dict[str, set[str]] = {}
    for name, path in names.items():
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        asked = {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}
        asked |= {str(node.module) for node in nodes}
        found[name] = asked & names.keys()
    return found


def room(module: str) -> str:
    return module.split(".")[1]


def test_rooms_import_what_they_say() -> None:
    found: dict[str, set[str]] = {}
    for module, imported in arrows().items():
        found.setdefault(room(module), set()).update(room(one) for one in imported if room(one) != room(module))
    assert found == MAY_IMPORT
    assert {path.name for path in (ROOT / "pipeline").iterdir() if (path / "__init__.py").is_file()} < found.keys()


def test_no_module_is_imported_by_one_that_it_imports() -> None:
    left = arrows()
    while free := {module for module, imported in left.items() if not imported & left.keys()}:
        left = {module: imported for module, imported in left.items() if module not in free}
    assert left == {}


def imported(path: Path) -> set[str]:
    """The modules that a file may import by its `import` statements; of `from a import b`, `a` and `a.b`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            found |= {origin, *(f"{origin}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_no_test_file_is_imported() -> None:
    """What several of them need stands in tests/made, and a fixture is asked for by its name."""
    files = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").glob("*.py")]
    assert len([path for path in files if path.name.startswith("test_")]) > 70
    wrong = {
        path.relative_to(ROOT).as_posix(): sorted(names)
        for path in files
        if (names := {one for one in imported(path) if re.search(r"(^|\.)(test_\w+|conftest)(\.|$)", one)})
    }
    assert wrong == {}


def test_a_checkpoint_belongs_to_the_code_that_its_stage_declares() -> None:
    declared = {name: {dep.removeprefix("pipeline/") for dep in code(STAGES[name])} for name in STAGES}
    assert set(resume.CODE["train"]) | {"stages/train.py"} == declared["train"]
    assert set(resume.CODE["infer"]) | {"stages/infer_tuned.py"} == declared["infer-tuned"]


def test_dvc_passes_over_what_digests_pass_over() -> None:
    lines = (ROOT / ".dvcignore").read_text().splitlines()
    assert [line for line in lines if not line.startswith(("/", "# "))] == list(records.IGNORED)


@pytest.mark.parametrize("name", sorted(COMPUTES))
def test_compute_stages_depend_on_the_pinned_versions(name: str) -> None:
    assert "constraints.txt" in STAGES[name]["deps"]


def test_the_base_depends_on_nothing_of_lora_or_training() -> None:
    kinds = ("", "-unquantized", "-shots")
    for name in [f"{stage}{kind}" for stage in ("infer", "evaluate") for kind in kinds]:
        given = [*STAGES[name]["deps"], *STAGES[name]["params"]]
        inputs = [one for one in given if one not in ("constraints.txt", "out/data/train.jsonl")]
        assert "seeds" not in given
        assert [item for item in inputs if any(word in item for word in ("lora", "adapter", "train", "tuned"))] == []


def test_of_runtime_and_tracking_only_what_changes_rounding_is_declared() -> None:
    declared = {section for stage in STAGES.values() for section in stage.get("params", [])}
    sections = {section.key for section in params.Section.__subclasses__() if hasattr(section, "key")}
    alone = {"generation.max_new_tokens", "baseline.unquantized", "baseline.rows", "quantize.method", "evaluate.split"}
    rounding = {"runtime.threads", "runtime.processes", "runtime.sharding"}
    assert declared == sections - {"runtime", "tracking"} | {"seeds", *alone} | rounding
    assert {name for name in STAGES if "runtime.threads" in STAGES[name].get("params", [])} == COMPUTES
    # Inference gives whole rounds to a process: their number changes none.
    assert [name for name in STAGES if "runtime.processes" in STAGES[name].get("params", [])] == ["train"]


def test_the_graph_is_the_whole_design() -> None:
    assert list(STAGES) == [
        "check",
        "prepare",
        "fetch",
        "prompts",
        "quantize",
        "contamination",
        "train",
        "infer",
        "infer-tuned",
        "infer-unquantized",
        "infer-shots",
        "evaluate",
        "evaluate-tuned",
        "evaluate-unquantized",
        "evaluate-shots",
        "forget",
        "compare",
        "track",
    ]


def test_no_command_holds_a_value_of_the_parameters() -> None:
    """DVC hands commands to a shell."""
    commands = {name: command(definition) for name, definition in STAGES.items()}
    assert {name: text for name, text in commands.items() if re.fullmatch(r"python -m stages\.\w+", text) is None} == {}


def test_the_parameters_are_checked_before_any_other_stage_starts() -> None:
    made = {"out/checked.json"}
    for name in ("prepare", "fetch", "prompts", "quantize", "train", "infer", "infer-tuned", "forget", "evaluate"):
        assert made & set(STAGES[name]["deps"]), name
        made |= set(outs(STAGES[name]))


def test_prompts_are_checked_before_anything_is_computed_with_the_model() -> None:
    """`train` and `infer` declare the output of the check, and so does `quantize`: the stages after them follow."""
    waiting = {name for name in STAGES if "out/fitting.json" in STAGES[name]["deps"]}
    assert waiting == {"quantize", "contamination", "train", "infer", "infer-unquantized", "infer-shots"}
    assert set(STAGES["prompts"]["params"]) == {"prompt", "generation.max_new_tokens", "baseline", "evaluate.split"}
    assert not {"out/data", "out/data/test.jsonl"} & set(STAGES["train"]["deps"]), (
        "a new test split trains nothing anew"
    )


def test_two_stages_write_files_of_a_seed_that_differ_by_their_folder_alone() -> None:
    """A seed that leads out of the folders leads both to one file, and DVC refuses the whole graph."""
    same = [out for definition in STAGES.values() for out in outs(definition) if out.endswith("/${item.seed}.json")]
    assert sorted(same) == ["out/forgetting/${item.seed}.json", "out/training/${item.seed}.json"]


def test_every_script_is_short() -> None:
    scripts = sorted((ROOT / "stages").glob("*.py"))
    assert len(scripts) == 19
    for path in scripts:
        assert len(path.read_text().splitlines()) <= 40, path


def outs(definition: dict[str, Any]) -> list[str]:
    return [next(iter(out)) if isinstance(out, dict) else str(out) for out in definition["outs"]]


def test_no_output_of_the_claims_is_cached() -> None:
    """`dvc exp apply`, `checkout` and `pull` look at every graph, and would fail where claims have not been checked."""
    options = [out for definition in CLAIMS.values() for out in definition["outs"]]
    assert all(isinstance(out, dict) and list(out.values()) == [{"cache": False}] for out in options)


def test_every_claim_of_the_register_has_one_measurement() -> None:
    wanted = set(YAML(typ="safe", pure=True).load((ROOT / "claims/claims.yaml").read_text())["claims"])
    place = "out/claims/evidence/"
    measured = [
        out.removeprefix(place).removesuffix(".json").replace("${item.claim}", claim).replace("${key}", claim)
        for name, definition in CLAIMS.items()
        for out in outs(definition)
        for claim in TEMPLATES[name].get("matrix", {}).get("claim") or TEMPLATES[name].get("foreach", [""])
        if out.startswith(place)
    ]
    assert sorted(measured) == sorted(wanted)


def test_a_measurement_depends_on_the_recipe_that_it_reads() -> None:
    """`claims.lab.experiment` lays a recipe over params.default.yaml."""
    reads = {name for name, definition in CLAIMS.items() if "params.default.yaml" in str(definition.get("params"))}
    assert reads == {name for name, definition in CLAIMS.items() if "recipes/" in str(definition["deps"])} != set()


def test_claims_are_checked_in_the_project_folder() -> None:
    assert {definition["wdir"] for definition in CLAIMS.values()} == {".."}


def test_the_default_experiment_depends_on_no_claim() -> None:
    assert not any("claims" in str(definition) for definition in STAGES.values())


def test_dvc_reads_the_claims_graph() -> None:
    """What it declares by templates is there, and a claim's stage is named as its claim."""
    command = [sys.executable, "-m", "dvc", "stage", "list", "--name-only", "claims/dvc.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    named = {name.partition(":claim@")[2] for name in done.stdout.split() if ":claim@" in name}
    assert named == set(YAML(typ="safe", pure=True).load((ROOT / "claims/claims.yaml").read_text())["claims"])
