"""LoRA adapters (arXiv 2106.09685) through PEFT: save them, and load them with a proof that they act.

`pipeline.lora.start` makes them.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core import contracts, records
from pipeline.core.contracts import AdapterOrigin
from pipeline.core.errors import UserError
from pipeline.model import shard

if TYPE_CHECKING:
    import torch

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
ORIGIN = "origin.json"
"""The digest of the base (`contracts.AdapterOrigin`), beside PEFT's two files. PEFT ignores it."""

NAME, START = "default", "start"
"""PEFT's names of the adapter, and of the frozen one that takes its start away again (`pipeline.lora.start`)."""
MAGNITUDE = "lora_magnitude_vector"
"""DoRA's lengths of weights. They stay in float32, as in PEFT: a step is less than the rounding of bfloat16."""


def tensors(adapted: Any) -> dict[str, "torch.nn.Parameter"]:
    """The trainable tensors by name, which are the adapter's."""
    return {name: tensor for name, tensor in adapted.named_parameters() if tensor.requires_grad}


def frozen(adapted: Any) -> dict[str, "torch.nn.Parameter"]:
    """The adapter's tensors that are not trained, by name."""
    return {name: one for name, one in adapted.named_parameters() if "lora_" in name and not one.requires_grad}


def dtype(name: str, model: Any) -> "torch.dtype":
    """The type in which a tensor of an adapter on `model` is multiplied."""
    import torch

    return torch.float32 if MAGNITUDE in name else model.dtype


def save(adapted: Any, values: Mapping[str, "torch.Tensor"], folder: Path, model_sha256: str) -> None:
    """Write the adapter in PEFT's format, with `values` in place of its `tensors`. UserError if one is not finite.

    `model_sha256` is the digest of the quantized base.
    """
    import torch

    bad = [name for name, tensor in values.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise UserError(f"the trained adapter holds NaN or infinity (in {bad[0]}): lower train.learning_rate")
    held = {name: tensor.detach() for name, tensor in adapted.named_parameters() if "lora_" in name}
    # Those that are not trained are whole in every process, so this one can read them alone.
    state = {name: one.float() for name, one in held.items() if f".{NAME}." in name and name not in values}
    state |= dict(values)
    changes: dict[str, Any] = {}
    if START in adapted.peft_config:
        state = {name: _with_start(name, tensor, held) for name, tensor in state.items()}
        changes = _twice_the_rank(adapted.peft_config[NAME])
    adapted.save_pretrained(folder, state_dict=state, selected_adapters=[NAME])
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    # PEFT keeps the layers' names in a set, whose order differs between processes.
    config = records.read_json(folder / CONFIG)
    changes["target_modules"] = sorted(config["target_modules"])
    records.write_json(folder / CONFIG, config | changes)
    contracts.write(folder / ORIGIN, AdapterOrigin(model_sha256))


def _with_start(name: str, tensor: "torch.Tensor", held: Mapping[str, "torch.Tensor"]) -> "torch.Tensor":
    """A or B with the frozen start beside it: B A - B0 A0 = [B, -B0] [A; A0], as in PEFT's `subtract_mutated_init`."""
    import torch

    start = held[name.replace(f".{NAME}.", f".{START}.")].to(tensor)
    return torch.cat([tensor, start], 0 if ".lora_A." in name else 1)


def _twice_the_rank(config: Any) -> dict[str, Any]:
    """The changes of PEFT's configuration that keep every layer's scale at twice its rank."""
    factor = math.sqrt(2) if config.use_rslora else 2
    return {
        "r": 2 * config.r,
        "lora_alpha": factor * config.lora_alpha,
        "rank_pattern": {key: 2 * rank for key, rank in config.rank_pattern.items()},
        "alpha_pattern": {key: factor * alpha for key, alpha in config.alpha_pattern.items()},
    }


def base_biases(model: Any, trained: str) -> dict[str, "torch.Tensor"]:
    """The base's biases by name, if an adapter will train them (`lora.bias`). PEFT trains them in place."""
    if trained == "none":
        return {}
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters() if name.endswith(".bias")}


@contextmanager
def off(adapted: Any) -> Iterator[None]:
    """Within it, a model with an adapter computes what its base does, biases included.

    PEFT then lets every tensor of the adapter require gradients; here those that are frozen stay so.
    """
    own = getattr(adapted, "base_biases", {})
    still = frozen(adapted).values() if hasattr(adapted, "peft_config") else []
    there = {name.replace(".base_layer.", "."): tensor for name, tensor in _base_parameters(adapted)} if own else {}
    trained = {name: there[name].data for name in own}
    try:
        for name, tensor in own.items():
            there[name].data = tensor
        with ExitStack() as disabled:
            with warnings.catch_warnings():  # PEFT says that biases stay; here they do not
                warnings.filterwarnings("ignore", "Careful, disabling adapter layers with bias", UserWarning)
                disabled.enter_context(adapted.disable_adapter())
            yield
    finally:
        for name, tensor in trained.items():
            there[name].data = tensor
        for tensor in still:
            tensor.requires_grad = False


def _base_parameters(adapted: Any) -> Any:
    return adapted.get_base_model().named_parameters()


@dataclass(frozen=True)
class Saved:
    """A saved adapter in `folder`."""

    folder: Path

    @property
    def sha256(self) -> str:
        """Digest of the folder."""
        return records.sha256_tree(self.folder)

    @property
    def parameters(self) -> int:
        """About how many values it has: they are saved in float32."""
        return (self.folder / WEIGHTS).stat().st_size // 4

    def require_of(self, model_sha256: str) -> None:
        """UserError if the adapter was trained on another base."""
        origin = contracts.read(self.folder / ORIGIN, AdapterOrigin).model_sha256
        if origin != model_sha256:
            raise UserError(
                f"{self.folder} was trained on another base (sha256 {origin}) than the one loaded ({model_sha256})"
            )

    def load(self, model: Any, model_sha256: str, name: str = "default") -> Any:
        """Put the adapter on the base it was trained on, and prove that it acts.

        A base with adapters keeps them, and this one becomes the active one. On the returned model, `set_adapter(name)`
        switches between adapters, and within `off` the model is the base.

        UserError if the adapter belongs to another base, if the model has an adapter of that name, if a tensor is
        missing, superfluous, not finite or not loaded as saved, or if the logits do not change.
        """
        from peft import PeftModel, get_peft_model_state_dict
        from safetensors.torch import load_file

        from pipeline.model import fused

        self.require_of(model_sha256)
        saved = load_file(self.folder / WEIGHTS)
        if isinstance(model, PeftModel):
            if name in model.peft_config:
                raise UserError(f"the model already holds an adapter named {name}")
            model.load_adapter(str(self.folder), name, autocast_adapter_dtype=False)
            model.set_adapter(name)
            adapted = model
        else:
            biases = base_biases(model, records.read_json(self.folder / CONFIG).get("bias", "none"))
            adapted = PeftModel.from_pretrained(model, self.folder, name, autocast_adapter_dtype=False)
            adapted.base_biases = biases
        if shard.kind(adapted) == "tensor":
            shard.fit(adapted)
        state = get_peft_model_state_dict(adapted, adapter_name=name)
        self._require_loaded(saved, {key: shard.whole(tensor) for key, tensor in state.items()})
        for key, tensor in adapted.named_parameters():
            if MAGNITUDE in key and f".{name}." in key:  # PEFT has rounded it
                tensor.data = saved[key.removesuffix(f".{name}.weight")].to(tensor.device)
            elif "lora_" in key:
                tensor.data = tensor.data.to(dtype(key, model))
        fused.apply(adapted.eval())
        if logit_change(adapted) == 0.0:
            raise UserError(f"{self.folder} does not change the model's logits: it was not trained, or is not applied")
        return adapted

    def _require_loaded(self, saved: Mapping[str, "torch.Tensor"], loaded: Mapping[str, "torch.Tensor"]) -> None:
        import torch

        differing = sorted(set(saved) ^ set(loaded))
        if differing:
            raise UserError(f"{self.folder}: {len(differing)} tensors missing or unexpected, such as {differing[0]}")
        for name, tensor in saved.items():
            if not torch.isfinite(tensor).all():
                raise UserError(f"{self.folder}: {name} holds NaN or infinity")
            if not torch.equal(tensor.to(loaded[name]), loaded[name]):
                raise UserError(f"{self.folder}: {name} was not loaded as saved")


def logit_change(adapted: Any) -> float:
    """The adapter's largest absolute change of a next-token logit, on a fixed sequence."""
    import torch

    ids = torch.arange(3, 19, device=adapted.device)[None] % adapted.config.vocab_size
    with torch.no_grad():
        with_adapter = adapted(input_ids=ids).logits
        with off(adapted):
            without = adapted(input_ids=ids).logits
    return float((with_adapter - without).abs().max())
