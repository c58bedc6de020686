"""What a check found: the mistakes, what was looked at, and what only a stage can see."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pipeline.core.errors import UserError, listing
from pipeline.core.progress import say


@dataclass(slots=True)
class Report:
    """`problems` are the mistakes. `seen` and `left` name what was checked, and what was not, with the reason."""

    problems: list[str] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @contextmanager
    def part(self) -> Iterator[None]:
        """Note a UserError of the block as a mistake, once, and go on behind the block."""
        try:
            yield
        except UserError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))

    def close(self) -> None:
        """Print what was checked. UserError with all mistakes, if there are any."""
        if self.problems:
            count = f"{len(self.problems)} mistake{'s' if len(self.problems) > 1 else ''}"
            raise listing(self.problems, f"{count}; nothing was started:")
        say(f"checked: {', '.join(self.seen)}")
        for one in self.left:
            say(f"not checked: {one}")
