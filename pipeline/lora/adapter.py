"""LoRA adapters (arXiv 2106.09685) through PEFT: make, save, and load them with a proof that they act."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core import contracts, params, records
from pipeline.core.contracts import AdapterOrigin
from pipeline.core.errors import UserError
from pipeline.model import checkpoint, shard

if TYPE_CHECKING:
    import torch

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
ORIGIN = "origin.json"
"""The digest of the base (`contracts.AdapterOrigin`), beside PEFT's two files. PEFT ignores it."""


def attach(model: Any, lora: params.Lora, seed: int) -> Any:
    """Put a fresh adapter on a loaded base: A is drawn from `seed` and B is zero, so the model starts as the base.

    Returns PEFT's model. UserError for a target module that the base does not have.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    from pipeline.model import fused

    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        use_rslora=lora.rslora,
        lora_dropout=lora.dropout,
        target_modules=targets(model, lora),
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    if shard.kind(adapted) == "tensor":
        shard.fit(adapted)
        shard.draw(adapted, seed)
    fused.apply(adapted)
    return adapted


def targets(model: Any, lora: params.Lora) -> list[str]:
    """The names of the layers to adapt. UserError for a name that the model does not have."""
    known = checkpoint.linear_layers(model)
    if lora.target_modules == "all-linear":
        return known
    unknown = sorted(set(lora.target_modules) - set(known))
    if unknown:
        raise UserError(
            f"lora.target_modules names {', '.join(unknown)}, which this model does not have; "
            f"it has {', '.join(known)} (all-linear takes all of them)"
        )
    return sorted(set(lora.target_modules))


def tensors(adapted: Any) -> dict[str, "torch.nn.Parameter"]:
    """The trainable tensors by name, which are the adapter's."""
    return {name: tensor for name, tensor in adapted.named_parameters() if tensor.requires_grad}


def save(adapted: Any, values: Mapping[str, "torch.Tensor"], folder: Path, model_sha256: str) -> None:
    """Write the adapter in PEFT's format, with `values` in place of its `tensors`. UserError if one is not finite.

    `model_sha256` is the digest of the quantized base.
    """
    import torch

    bad = [name for name, tensor in values.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise UserError(f"the trained adapter holds NaN or infinity (in {bad[0]}): lower train.learning_rate")
    adapted.save_pretrained(folder, state_dict=dict(values))
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    # PEFT keeps the layers' names in a set, whose order differs between processes.
    config = records.read_json(folder / CONFIG)
    records.write_json(folder / CONFIG, config | {"target_modules": sorted(config["target_modules"])})
    contracts.write(folder / ORIGIN, AdapterOrigin(model_sha256))


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
        switches between adapters, and within `disable_adapter()` the model is the base.

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
            adapted = PeftModel.from_pretrained(model, self.folder, name, autocast_adapter_dtype=False)
        if shard.kind(adapted) == "tensor":
            shard.fit(adapted)
        state = get_peft_model_state_dict(adapted, adapter_name=name)
        self._require_loaded(saved, {key: shard.whole(tensor) for key, tensor in state.items()})
        for key, tensor in adapted.named_parameters():
            if "lora_" in key:
                tensor.data = tensor.data.to(model.dtype)
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
        with adapted.disable_adapter():
            without = adapted(input_ids=ids).logits
    return float((with_adapter - without).abs().max())
