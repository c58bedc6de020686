"""Several processes, one experiment: each computes a share, and together they give what one process gives.

DVC starts a stage that can be shared (`run`) once. The stage starts `runtime.processes` members: its own command again,
with torch.distributed's environment variables, which accelerate reads. If torchrun or `accelerate launch` has set those
already, on one machine or several, the process itself is a member. Only member 0 writes outputs. When a member dies,
all others are ended. How members divide the base is in `pipeline.model.shard`.
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
from pipeline.core.progress import VALIDATIONS, print_in_any_locale, say

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

FOLDER = "LORA_REPRO_MEMBERS"
"""The environment variable that a stage sets for its members: the folder in which they meet and leave results."""
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
SECONDS_BETWEEN_LOOKS = 0.05
DAYS = 30
"""How long a member waits for the others: as long as it takes. Whoever started them notices if one died."""


def count() -> int:
    """The number of processes that share this stage: 1 unless a launcher says otherwise."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This member's number, from 0; 0 is the one that writes."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def run(name: str, call: Callable[[params.Declared], None], result: Path, seed: int | None = None) -> None:
    """`stage.run` for a stage that can be shared: this process computes, or starts members, or is one of them."""
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
    print_in_any_locale()
    member(lambda: _take_part(params.read(name), call))


def member(call: Callable[[], object]) -> None:
    """Make `call`, and leave its result, or what went wrong, in `FOLDER` for the stage that started this member.

    Exits with 1 after an error, and with 130 after an interrupt.
    """
    folder = os.environ.get(FOLDER)
    try:
        result = call()
    except UserError as error:
        if folder is None:
            print(f"\nerror: {error}\n", file=sys.stderr, flush=True)
        else:
            records.write_text(Path(folder) / f"{rank()}.error", str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:
        if folder is None:
            raise
        records.write_text(Path(folder) / f"{rank()}.traceback", traceback.format_exc())
        # Not sys.exit: torch.distributed may wait for the others when the interpreter ends.
        os._exit(1)
    if folder is not None and rank() == 0:
        records.write_json(Path(folder) / "given.json", result)


def launch(command: Sequence[str], count: int, folder: Path) -> dict[str, object]:
    """Run `command` as `count` members on this machine, and return the result of member 0.

    `folder` is emptied first, and removed at the end. Members end with this process, however it ends. A member's
    UserError is raised here; a UserError also says that a member died, after all others have been ended.
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
                # Anyone who can connect to the members can send them anything: only this machine can.
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
        result: dict[str, object] = records.read_json(folder / "given.json")
        return result
    finally:
        for one in members:
            one.kill()
        for one in members:
            one.wait()
            if one.stdin is not None:
                one.stdin.close()
        shutil.rmtree(folder)


def _require_success(codes: Sequence[int | None], folder: Path) -> None:
    """UserError if a member has failed: with its own UserError if it left one, else with what ended it."""
    count = len(codes)
    for number in range(count):
        said = folder / f"{number}.error"
        if said.is_file():  # even if it is still running: others may notice its failure, and end first
            raise UserError(said.read_text(encoding="utf-8"))
    # Members also fail because another is gone. The cause is the one that was killed, else the one that failed first.
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
            output = (folder / name).read_text(encoding="utf-8", errors="replace")
            print(printable(output), file=sys.stderr, flush=True)
    how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"failed with exit code {code}"
    memory = "; if the system ended it for lack of memory, lower runtime.processes" if code == -signal.SIGKILL else ""
    raise UserError(
        f"process {number} of {count} (counted from 0) {how}, and the others were ended{memory}: `dvc repro` "
        "continues from the last checkpoint"
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
    """Make the call. Returns what it cost several members together: memory summed, device memory at its maximum."""
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
    _state().destroy_process_group()
    given: dict[str, object] = {
        **costs[0],
        "processes": count(),
        "peak_memory_mb": round(sum(cost["peak_memory_mb"] for cost in costs), 1),
    }
    if "peak_device_memory_mb" in costs[0]:
        given["peak_device_memory_mb"] = max(cost["peak_device_memory_mb"] for cost in costs)
    return given


_is_one_model = False
"""Whether the members share one model by heads and columns, and so compute the same rows. `join` sets it."""


def shares() -> int:
    """The number of shares into which rows are divided."""
    return 1 if _is_one_model else count()


def _has_met() -> bool:
    """Whether this member has joined the others: not if the stage had nothing to compute."""
    import torch

    return count() > 1 and torch.distributed.is_initialized()


def divide(items: Sequence[T], weight: Callable[[T], int], shares: int) -> list[list[T]]:
    """Divide whole items into shares of about equal weight: the heaviest first, each to the lightest share.

    LPT scheduling (Graham 1969). One share is `items` in their order.
    """
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
    """The sum of `number` over all shares. `tensors` are summed in place. All members get the same values."""
    if shares() == 1:
        return number
    import torch

    one = torch.tensor([number], dtype=torch.float64, device=_state().device)
    torch.distributed.all_reduce(one)
    if tensors:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
    return float(one)


def gather(value: T) -> list[T]:
    """The values of all members, in the order of their numbers; each member gets them.

    Values are sent as JSON. torch's all_gather_object reads pickles, which can run code, and a member cannot know that
    the others are the senders. TypeError for a `value` that JSON would change; UserError for received text that is not
    JSON.
    """
    if count() == 1:
        return [value]
    import torch

    text = json.dumps(value)
    if repr(json.loads(text)) != repr(value):  # with ==, NaN would differ from itself, and 1 equal True
        raise TypeError(f"JSON would change this value of type {type(value).__name__}: {value!r:.200}")
    own_L = torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8).to(_state().device)
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
            f"process {number} of {count()} (counted from 0) sent text that is not JSON: it runs other code than "
            "this one, or another program has connected in its place"
        ) from None


def done_by_all(done: set[str]) -> set[str]:
    """Items that this member can skip. If all members compute the same rows: only those that every member has done."""
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
    """Join the members that a launcher has started, and return the device of this one: a GPU, else the CPU.

    With `one_model` they compute the same rows. UserError for more members on a machine than it has GPUs, and for
    several on MPS, which cannot add up over processes.
    """
    from datetime import timedelta

    import torch
    from accelerate import PartialState

    gpu = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    found = "cpu" if cpu_only else gpu
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
    # Otherwise accelerate chooses a number of threads, and warns.
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    patience = timedelta(days=DAYS)
    how: dict[str, Any] = {"timeout": patience}
    if FOLDER in os.environ:  # through a file: anyone could connect to a port
        meeting = str(Path(os.environ[FOLDER]) / "meeting")
        store = torch.distributed.FileStore(meeting, count())  # type: ignore[attr-defined]
        store.set_timeout(patience)
        how |= {"store": store, "rank": rank(), "world_size": count()}
    device: torch.device = PartialState(cpu=found == "cpu", **how).device
    return device


def local_processes() -> int:
    """The number of members on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count()))


def _state() -> Any:
    """accelerate's state of this process: its device and the group that it has joined."""
    from accelerate import PartialState

    return PartialState()
