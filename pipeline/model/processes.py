"""Several processes, one experiment: each computes a share, and together they give what one process gives.

A stage that can be shared (`run`) is started once, by DVC, and starts `runtime.processes` members: its own command
again with torch.distributed's environment variables, which accelerate reads. Where those are set already, by torchrun
or `accelerate launch` on one machine or several, the process is a member itself. Member 0 alone writes outputs; whoever
dies takes all others along. What each member holds of the base is another matter (`pipeline.model.shard`).
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.core import params, paths, records, stage
from pipeline.core.errors import UserError, printable
from pipeline.core.progress import VALIDATIONS, say

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

FOLDER = "LORA_REPRO_MEMBERS"
"""The environment variable by which a member knows that a stage of ours started it. In this folder members meet, and
leave word."""
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
SECONDS_BETWEEN_LOOKS = 0.05
DAYS = 30
"""How long a member waits for the others: as long as it takes. Who died is seen by whoever started them."""


def count() -> int:
    """Of how many processes this one is a member: 1 unless a launcher says otherwise."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This member's number, from 0; 0 is the one that writes."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def run(name: str, call: Callable[[params.Declared], None], result: Path, seed: int | None = None) -> None:
    """`stage.run` for a stage that can be shared: by this process, by members that it starts, or as one of them."""
    address = stage.address(name, seed)
    if FOLDER not in os.environ and rank() == 0:

        def compute() -> dict[str, Any] | None:
            declared = params.read(name)
            wanted = declared[params.Runtime].processes
            if "WORLD_SIZE" not in os.environ and wanted > 1:
                say(f"{address}: {wanted} processes")
                return launch([sys.executable, *sys.orig_argv[1:]], wanted, paths.SCRATCH / f"{address}.members")
            return _take_part(declared, call)

        stage.process(address, compute, result, shared=True)
        return
    if FOLDER in os.environ:
        _leave_with_the_starter()
    if rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - no path; open to the end
        os.environ.pop(VALIDATIONS, None)
    stage.set_environment()
    member(lambda: _take_part(params.read(name), call))


def member(call: Callable[[], object]) -> None:
    """Make `call` and leave word of what it gave, or of what went wrong, for whoever started this member."""
    told = os.environ.get(FOLDER)
    try:
        given = call()
    except UserError as error:
        if told is None:
            print(f"\nerror: {error}\n", file=sys.stderr, flush=True)
        else:
            records.write_text(Path(told) / f"{rank()}.error", str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:
        if told is None:
            raise
        records.write_text(Path(told) / f"{rank()}.traceback", traceback.format_exc())
        # Not sys.exit: at the interpreter's end, what is left of torch.distributed may wait for the others.
        os._exit(1)
    if told is not None and rank() == 0:
        records.write_json(Path(told) / "given.json", given)


def launch(command: Sequence[str], count: int, folder: Path) -> dict[str, object]:
    """Run `command` as `count` members of one machine, and return what member 0 gives.

    Members end with this process, however that ends. UserError of a member as if it were raised here; UserError when
    one dies, after all others have been ended.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    members: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(count):
            environment = os.environ | {
                "RANK": str(number),
                "LOCAL_RANK": str(number),
                "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count),
                # Whoever reaches where they listen can send them anything: no other machine may.
                "GLOO_SOCKET_IFNAME": LOOPBACK,
                "NCCL_SOCKET_IFNAME": f"={LOOPBACK}",
                FOLDER: str(folder.resolve()),
            }
            with (folder / f"{number}.stderr").open("wb") as stderr:
                members.append(
                    subprocess.Popen(
                        command,
                        env=environment,
                        stdin=subprocess.PIPE,
                        stdout=None if number == 0 else subprocess.DEVNULL,
                        stderr=None if number == 0 else stderr,
                    )
                )
        while any(one.poll() is None for one in members):
            if any(one.poll() for one in members):
                break
            time.sleep(SECONDS_BETWEEN_LOOKS)
        _require_success([one.poll() for one in members], folder)
        given: dict[str, object] = records.read_json(folder / "given.json")
        return given
    finally:
        for one in members:
            one.kill()
        for one in members:
            one.wait()
            if one.stdin is not None:
                one.stdin.close()
        shutil.rmtree(folder)


def _require_success(codes: Sequence[int | None], folder: Path) -> None:
    """UserError when a member has failed: what it said if it did, else what ended it."""
    count = len(codes)
    for number in range(count):
        said = folder / f"{number}.error"
        if said.is_file():  # whether it has ended or not: others may see that it is gone, fail and end sooner
            raise UserError(said.read_text(encoding="utf-8"))
    # A member whose neighbour is gone fails as well: the one that was killed comes first, then who failed first.
    failed = [number for number, code in enumerate(codes) if code]
    if not failed:
        return

    def order(number: int) -> tuple[bool, float]:
        written = folder / f"{number}.traceback"
        return (codes[number] or 0) >= 0, written.stat().st_mtime if written.is_file() else 0.0

    number = min(failed, key=order)
    code = codes[number] or 0
    for name in (f"{number}.stderr", f"{number}.traceback"):
        if (folder / name).is_file():
            told = (folder / name).read_text(encoding="utf-8", errors="replace")
            print(printable(told), file=sys.stderr, flush=True)
    how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"failed with exit code {code}"
    memory = "; if it was the system for want of memory, lower runtime.processes" if code == -signal.SIGKILL else ""
    raise UserError(
        f"process {number} of {count} (counted from 0) {how}, and the others were ended{memory}: `dvc repro` goes on "
        "from the last checkpoint"
    )


def _leave_with_the_starter() -> None:
    """End this member when the process that started it closes its end of standard input, or dies (`kill -9` too).

    An interrupt from the terminal reaches both; the starter acts on it.
    """

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def _take_part(declared: params.Declared, call: Callable[[params.Declared], None]) -> dict[str, object] | None:
    """Make the call; of several members, what it cost them together: memory summed, that of the fullest accelerator."""
    wanted = declared[params.Runtime].processes
    if count() != wanted:
        raise UserError(
            f"runtime.processes = {wanted}, but WORLD_SIZE = {count()} in the environment says how many processes "
            "a launcher started: make the two equal, or unset WORLD_SIZE"
        )
    call(declared)
    if not _has_met():
        return None
    costs = gather(stage.cost())
    _end()
    given: dict[str, object] = {
        **costs[0],
        "processes": count(),
        "peak_memory_mb": round(sum(cost["peak_memory_mb"] for cost in costs), 1),
    }
    if "peak_device_memory_mb" in costs[0]:
        given["peak_device_memory_mb"] = max(cost["peak_device_memory_mb"] for cost in costs)
    return given


_is_one_model = False
"""Whether the members hold one model together, and so compute the same rows (`pipeline.model.shard`, tensor)."""


def shares() -> int:
    """Into how many shares rows are divided."""
    return 1 if _is_one_model else count()


def _has_met() -> bool:
    """Whether this member and the others have joined: not where a stage had nothing to compute."""
    import torch

    return count() > 1 and torch.distributed.is_initialized()


def divide(items: Sequence[T], weight: Callable[[T], int], shares: int) -> list[list[T]]:
    """Whole items in so many shares of about equal weight, each item in one: the heaviest first, to the lightest share
    (LPT, Graham 1969). One share is `items` as they are."""
    if shares == 1:
        return [list(items)]
    filled: list[list[T]] = [[] for _ in range(shares)]
    loads = [0] * shares
    for item in sorted(items, key=lambda item: -weight(item)):
        lightest = loads.index(min(loads))
        filled[lightest].append(item)
        loads[lightest] += weight(item)
    return filled


def share(items: Sequence[T], weight: Callable[[T], int]) -> list[T]:
    """This member's share of `items`."""
    return divide(items, weight, shares())[rank() % shares()]


def add_up(number: float, tensors: "Sequence[torch.Tensor]" = ()) -> float:
    """Sum `tensors` over all shares, in place and alike in each member, and `number`, which is returned."""
    if shares() == 1:
        return number
    import torch

    one = torch.tensor([number], dtype=torch.float64, device=_device())
    torch.distributed.all_reduce(one)
    if tensors:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
    return float(one)


def gather(value: T) -> list[T]:
    """What each member holds, in the order of their numbers, for all of them.

    It goes as JSON: torch's all_gather_object reads pickles, which run what they say, and no member can know that it is
    the others who send. TypeError for a `value` that JSON would change; UserError for what comes and is not JSON.
    """
    if count() == 1:
        return [value]
    import torch

    text = json.dumps(value)
    if repr(json.loads(text)) != repr(value):  # not by ==, where NaN is not itself, and 1 is True
        raise TypeError(f"JSON would change this value of type {type(value).__name__}: {value!r:.200}")
    own_L = torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8).to(_device())
    length_1 = torch.tensor([len(own_L)], device=own_L.device)
    lengths = [torch.empty_like(length_1) for _ in range(count())]
    torch.distributed.all_gather(lengths, length_1)
    longest = int(max(lengths))
    padded = torch.nn.functional.pad(own_L, (0, longest - len(own_L)))
    parts = [torch.empty_like(padded) for _ in lengths]
    torch.distributed.all_gather(parts, padded)
    return [
        _read(number, part[: int(length)].cpu().numpy().tobytes())
        for number, (part, length) in enumerate(zip(parts, lengths, strict=True))
    ]


def _read(number: int, sent: bytes) -> Any:
    try:
        return json.loads(sent)
    except (ValueError, RecursionError):
        raise UserError(
            f"process {number} of {count()} (counted from 0) sent what is not JSON: it runs other code than this "
            "one, or another program has connected in its place"
        ) from None


def done_by_all(done: set[str]) -> set[str]:
    """What this member need not compute again: of what it has done, where all compute the same rows, what all have."""
    return done if shares() == count() else set.intersection(*map(set, gather(sorted(done))))


def require_same(value: Any, what: str) -> None:
    """UserError unless all members hold an equal `value` (JSON, or tensors by name)."""
    if count() == 1:
        return
    digests = gather(_digest(value))
    other = [number for number, digest in enumerate(digests) if digest != digests[0]]
    if other:
        raise UserError(
            f"process {other[0]} of {count()} (counted from 0) has another {what} than process 0: all of them need "
            "the same project folder, packages and number of threads (runtime.threads)"
        )


def _digest(value: Any) -> str:
    if not (isinstance(value, dict) and value and all(hasattr(item, "numpy") for item in value.values())):
        return records.sha256_text(json.dumps(value, sort_keys=True))
    digest = hashlib.sha256()
    for name in sorted(value):
        digest.update(name.encode() + value[name].detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def join(cpu_only: bool, one_model: bool = False) -> "torch.device":
    """Become one of the members that a launcher has started, and give the device of this one: a GPU, else the CPU.
    With `one_model` they compute the same rows.

    UserError for more members on a machine than it has GPUs, and for several on MPS, which cannot add up over them.
    """
    from datetime import timedelta

    import torch
    from accelerate import PartialState

    found = "cpu" if cpu_only else _accelerator()
    here = local_processes()
    if found == "mps":
        raise UserError(
            f"runtime.processes = {count()}, but MPS computes in one process: set runtime.processes to 1, or "
            "runtime.device to cpu"
        )
    if found == "cuda" and torch.cuda.device_count() < here:
        raise UserError(
            f"runtime.processes asks for {here} processes on this machine, each with a GPU of its own, and it has "
            f"{torch.cuda.device_count()}: lower runtime.processes, or set runtime.device to cpu"
        )
    global _is_one_model
    _is_one_model = one_model
    # accelerate would choose a number of threads itself, and warn of it.
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    patience = timedelta(days=DAYS)
    how: dict[str, Any] = {"timeout": patience}
    if FOLDER in os.environ:  # in a file: a port would be open to all who reach this machine
        meeting = str(Path(os.environ[FOLDER]) / "meeting")
        store = torch.distributed.FileStore(meeting, count())  # type: ignore[attr-defined]
        store.set_timeout(patience)
        how |= {"store": store, "rank": rank(), "world_size": count()}
    device: torch.device = PartialState(cpu=found == "cpu", **how).device
    return device


def local_processes() -> int:
    """How many members are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count()))


def _accelerator() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def _device() -> "torch.device":
    from accelerate import PartialState

    device: torch.device = PartialState().device
    return device


def _end() -> None:
    from accelerate import PartialState

    PartialState().destroy_process_group()
