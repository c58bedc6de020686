"""Where the result in the working directory comes from: experiment, commit, parameters, outputs, versions, machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.core import paths
from pipeline.record import identity, provenance


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a result comes from.

    `changed` names the files that differ from the commit. `stages` maps a stage to the md5 of its outputs in
    `dvc.lock`. `params` are those that the stages were locked with; `params_yaml` is the text of the file.
    """

    digest: str
    commit: str | None
    changed: list[str]
    experiment: str | None
    stages: dict[str, dict[str, str]]
    params: dict[str, str]
    params_yaml: str
    versions: dict[str, str]
    machine: dict[str, str | int]

    @classmethod
    def read(cls, seeds: Sequence[int]) -> "Origin":
        """The origin of the experiment in the working directory; UserError if it is not complete."""
        stages = identity.here(seeds)
        sha, _ = provenance.commit(Path())
        return cls(
            digest=identity.digest(stages),
            commit=sha,
            changed=provenance.changes(Path()),
            experiment=provenance.experiment(),
            stages={name: stage.outs for name, stage in stages.items()},
            params=identity.params_of(stages),
            params_yaml=paths.PARAMS.read_text(encoding="utf-8"),
            versions=provenance.versions(),
            machine=provenance.platform_facts(),
        )

    def commands(self) -> list[tuple[str, str]]:
        """The commands that compute the experiment again, each with what it does."""
        found = []
        if self.commit:
            found.append((f"git checkout {self.commit}", "the code and the parameters, in a clone of this repository"))
        if self.commit is None or paths.PARAMS.as_posix() in self.changed:
            found.append(("$EDITOR params.yaml", "it must hold what stands below under “params.yaml”"))
        found.append(("make repro", "installs the pinned versions into .venv, and runs the experiment"))
        found.append(("lora-repro verify", f"compares all by content; the experiment is {self.digest[:12]}…"))
        found.append(("lora-repro verify --recompute", "everything once more in a copy, compared stage by stage"))
        return found
