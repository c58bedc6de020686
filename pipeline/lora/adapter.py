"""LoRA adapters (arXiv 2106.09685) through PEFT: made, saved, and loaded with proof that they took effect."""

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
# Beside PEFT's two files, and ignored by it: the base that the adapter belongs to.
ORIGIN = "origin.json"


def attach(model: Any, lora: params.Lora, seed: int) -> Any:
    """Put a fresh adapter on a loaded base: A random by `seed`, B zero, so that the model starts as the base."""
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
    """The layer names to adapt; UserError for a name that the model does not have."""
    known = checkpoint.linear_layers(model)
    if lora.target_modules == "all-linear":
        return known
    unknown = sorted(set(lora.target_modules) - set(known))
    if unknown:
        raise UserError(
            f"lora.target_modules names {', '.join(unknown)}, which this model does not have; "
            f"it has {', '.join(known)} (all-linear takes them all)"
        )
    return sorted(set(lora.target_modules))


def tensors(adapted: Any) -> dict[str, "torch.nn.Parameter"]:
    """The trainable tensors by name; only the adapter's."""
    return {name: tensor for name, tensor in adapted.named_parameters() if tensor.requires_grad}


def save(adapted: Any, values: Mapping[str, "torch.Tensor"], folder: Path, model_sha256: str) -> None:
    """Write an adapter of these values (`tensors`) in PEFT's format; UserError when one is not finite."""
    import torch

    bad = [name for name, tensor in values.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise UserError(f"the trained adapter holds NaN or infinity (in {bad[0]}): lower train.learning_rate")
    adapted.save_pretrained(folder, state_dict=dict(values))
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    # PEFT keeps the layers' names in a set, whose order differs from process to process.
    config = records.read_json(folder / CONFIG)
    records.write_json(folder / CONFIG, config | {"target_modules": sorted(config["target_modules"])})
    contracts.write(folder / ORIGIN, AdapterOrigin(model_sha256))


@dataclass(frozen=True)
class Saved:
    """A saved adapter: its digest, and its way back onto the base."""

    folder: Path

    @property
    def sha256(self) -> str:
        return records.sha256_tree(self.folder)

    @property
    def parameters(self) -> int:
        """Values in it, which are saved in float32."""
        return (self.folder / WEIGHTS).stat().st_size // 4

    def require_of(self, model_sha256: str) -> None:
        """UserError when it belongs to another base."""
        origin = contracts.read(self.folder / ORIGIN, AdapterOrigin).model_sha256
        if origin != model_sha256:
            raise UserError(
                f"{self.folder} was trained on another base (sha256 {origin}) than the one loaded ({model_sha256})"
            )

    def load(self, model: Any, model_sha256: str, name: str = "default") -> Any:
        """Put the adapter on the base it was trained on, and prove that it acts.

        A base that holds adapters already keeps them, and this one becomes the active one: `set_adapter(name)` of what
        is returned switches between them, within `disable_adapter()` it is the base.

        UserError when it belongs to another base, when a tensor is missing, superfluous, not finite or not loaded as
        saved, or when the logits stay what they were; when there is an adapter of that name.
        """
        import torch
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
        loaded = {name: shard.whole(tensor) for name, tensor in state.items()}
        differing = sorted(set(saved) ^ set(loaded))
        if differing:
            raise UserError(f"{self.folder}: {len(differing)} tensors missing or unexpected, such as {differing[0]}")
        for name, tensor in saved.items():
            if not torch.isfinite(tensor).all():
                raise UserError(f"{self.folder}: {name} holds NaN or infinity")
            if not torch.equal(tensor.to(loaded[name]), loaded[name]):
                raise UserError(f"{self.folder}: {name} was not loaded as saved")
        for name, tensor in adapted.named_parameters():
            if "lora_" in name:
                tensor.data = tensor.data.to(model.dtype)
        fused.apply(adapted.eval())
        if logit_change(adapted) == 0.0:
            raise UserError(f"{self.folder} does not change the model's logits: it was not trained, or is not applied")
        return adapted


def logit_change(adapted: Any) -> float:
    """Largest absolute difference that the adapter makes to the next-token logits of a fixed sequence."""
    import torch

    ids = torch.arange(3, 19, device=adapted.device)[None] % adapted.config.vocab_size
    with torch.no_grad():
        with_adapter = adapted(input_ids=ids).logits
        with adapted.disable_adapter():
            without = adapted(input_ids=ids).logits
    return float((with_adapter - without).abs().max())
