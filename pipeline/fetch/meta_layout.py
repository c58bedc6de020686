"""Meta's original layout of Llama checkpoints: `consolidated.NN.pth`, `params.json` and `tokenizer.model` in a folder.

Each `.pth` file holds one rank's part of every tensor, as the model-parallel layers of fairscale split them: layers
that end a block (`wo`, `w2`) by their inputs, the embedding by its features, and other layers by their outputs. Norms
are whole in each rank. Llama 3 splits the embedding by words instead, which its shape shows. The files are pickles:
torch's unpickler for weights alone reads them, which refuses whatever could run code.

Rotary embeddings: Meta rotates neighbours (0, 1), (2, 3)..., transformers element i with i + d/2 (RoFormer, arXiv
2104.09864, section 3.4.2, allows either). So the rows of the query and key projections are reordered within each head.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.core import records
from pipeline.fetch.unfit import UnfitError, require_content, require_few_layers
from pipeline.model.apart_worker import PROBES

if TYPE_CHECKING:
    import torch

SHARD = re.compile(r"consolidated\.(\d\d)\.pth")
SETTINGS, TOKENIZER, CHECKLIST = "params.json", "tokenizer.model", "checklist.chk"
BY_INPUT = ("attention.wo", "feed_forward.w2")
"""Layers whose input is split over the ranks; other layers' output is."""
NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""Parts of a layer: Meta's names, and transformers'."""
OUTSIDE = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
"""Parts outside of the layers."""
FREQUENCIES = "rope.freqs"
"""One head's rotary frequencies, which follow from `rope_theta`: only their number is checked."""
INSTEAD = "name the checkpoint in the Hugging Face layout instead"


class Settings(BaseModel):
    """`params.json`. Other keys are refused, because they change what is computed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    dim: int = Field(ge=1)
    n_layers: int = Field(ge=1)
    n_heads: int = Field(ge=1)
    n_kv_heads: int | None = Field(default=None, ge=1)
    multiple_of: int = Field(ge=1)
    ffn_dim_multiplier: float | None = Field(default=None, gt=0)
    norm_eps: float = Field(gt=0)
    rope_theta: float = Field(default=10000.0, gt=0)
    vocab_size: int = Field(ge=-1)
    max_seq_len: int | None = Field(default=None, ge=1)

    @property
    def feed_forward(self) -> int:
        """Width of the gated layers: two thirds of four times `dim`, rounded up (arXiv 2302.13971, section 2.2)."""
        width = int(8 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return self.multiple_of * -(-width // self.multiple_of)

    @property
    def context(self) -> int:
        """Tokens. Where the file does not say it, the releases are told apart: Code Llama, Llama 3, 2, 1."""
        if self.max_seq_len is not None:
            return self.max_seq_len
        by_base = {1e6: 16384, 5e5: 8192}
        return by_base.get(self.rope_theta, 4096 if self.norm_eps == 1e-5 else 2048)

    @property
    def sizes(self) -> dict[str, Any]:
        """The model's sizes, by transformers' names, without that of the vocabulary."""
        return {
            "hidden_size": self.dim,
            "intermediate_size": self.feed_forward,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads or self.n_heads,
            "max_position_embeddings": self.context,
            "tie_word_embeddings": False,
        }


def is_layout(folder: Path) -> bool:
    """Whether a folder is in Meta's layout, and not in transformers' as well."""
    return (folder / SETTINGS).is_file() and not (folder / "config.json").exists()


def seen(folder: Path) -> Settings:
    """The settings; UnfitError for a folder whose names and settings show that it cannot be loaded."""
    require_content([folder / SETTINGS])
    settings = _settings(folder)
    require_content(_shards(folder))
    if not (folder / TOKENIZER).is_file():
        raise UnfitError(f"{TOKENIZER} is missing beside {SETTINGS}")
    require_content([folder / TOKENIZER])
    with (folder / TOKENIZER).open("rb") as file:
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", file.read(4096)):
            raise UnfitError(
                f"{TOKENIZER} is in tiktoken's format (Llama 3), which holds neither the special tokens nor "
                f"how text is split; {INSTEAD}"
            )
    return settings


def load(folder: Path, dtype: "torch.dtype", check: Callable[[Any, Any], None]) -> tuple[Any, Any]:
    """The model in transformers' own class, in `dtype`, and its tokenizer.

    `check` is called with the model without weights and the tokenizer, before the weights are read. UnfitError for what
    is missing, damaged, not of this layout, or not computed here.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = seen(folder)
    _require_listed(folder)
    opened = _opened(_shards(folder))
    _require_described(opened[0], settings)
    tokenizer, words = _tokenizer(folder)
    config = LlamaConfig(
        **settings.sizes,
        architectures=["LlamaForCausalLM"],
        vocab_size=words if settings.vocab_size == -1 else settings.vocab_size,
        rms_norm_eps=settings.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": settings.rope_theta},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        dtype=dtype,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    check(model, tokenizer)
    tensors = _whole(opened, config, dtype)
    shapes = {tensor: tuple(value.shape) for tensor, value in model.state_dict().items()}
    if lacking := sorted(shapes.keys() - tensors.keys()):
        raise UnfitError(f"it lacks {len(lacking)} of the model's tensors, such as {lacking[0]}; name a complete one")
    for tensor, shape in shapes.items():
        if tuple(tensors[tensor].shape) != shape:
            raise UnfitError(
                f"{tensor} of its {len(opened)} files is {tuple(tensors[tensor].shape)}, but "
                f"{shape} by {SETTINGS} and {TOKENIZER}: they are of two models, or a file is missing"
            )
    model.load_state_dict(tensors, assign=True)
    # Rotary frequencies are not in a checkpoint. They are computed now, since the meta device computes nothing.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval(), tokenizer


def _settings(folder: Path) -> Settings:
    try:
        content = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        settings = Settings.model_validate(content)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        what = ".".join(map(str, problem["loc"]))
        why = (
            f"says {what} = {problem['input']!r}, which is not computed here"
            if problem["type"] == "extra_forbidden"
            else f"does not describe a Llama ({f'{what}: ' if what else ''}{problem['msg'].partition(' or ')[0]})"
        )
        raise UnfitError(f"its {SETTINGS} {why}; {INSTEAD}") from None
    except (ValueError, RecursionError) as error:
        raise UnfitError(f"its {SETTINGS} is not JSON ({error})") from None
    if settings.dim % settings.n_heads or settings.n_heads % (settings.n_kv_heads or settings.n_heads):
        raise UnfitError(
            f"its {SETTINGS} says dim = {settings.dim}, n_heads = {settings.n_heads} and "
            f"n_kv_heads = {settings.n_kv_heads}, which do not divide each other"
        )
    return settings


def _require_listed(folder: Path) -> None:
    """UnfitError unless the files have the md5 sums of Meta's list, where there is one.

    Without it, parts in each other's place would not be noticed: they fit together all the same.
    """
    checklist = folder / CHECKLIST
    if not checklist.is_file():
        return
    there = {path.name for path in folder.iterdir()}
    for line in checklist.read_text(encoding="utf-8", errors="replace").splitlines():
        md5, _, file = line.strip().partition(" ")
        file = file.strip().lstrip("*")
        # A path that leads out of the folder is never in `there`, so it is not read.
        if file and (file not in there or records.dvc_md5(folder / file) != md5):
            wrong = "is not what it lists" if file in there else "is listed, and not there"
            raise UnfitError(f"by its {CHECKLIST}, {file} {wrong}: download it again")


def _shards(folder: Path) -> list[Path]:
    """The files of all ranks, in their order."""
    found = {int(match[1]): path for path in folder.iterdir() if (match := SHARD.fullmatch(path.name))}
    if not found:
        raise UnfitError(f"it holds {SETTINGS} and no consolidated.00.pth: it lacks the weights")
    if missing := sorted(set(range(max(found) + 1)) - found.keys()):
        raise UnfitError(f"consolidated.{missing[0]:02}.pth is missing, one of {max(found) + 1} parts at least")
    return [found[rank] for rank in sorted(found)]


def _opened(shards: list[Path]) -> list[dict[str, "torch.Tensor"]]:
    """The tensors of each rank by name. They stay on the disk until they are used."""
    import torch

    opened = []
    for path in shards:
        try:
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            # torch's first line says how to read the file all the same, which nobody should do.
            reasons = [
                line.strip() for line in str(error).splitlines()[1:] if line.strip() and "file an issue" not in line
            ]
            raise UnfitError(
                f"{path.name} is not a file of weights alone, and could run code "
                f"when it is read, so it is not ({(reasons or ['no reason is given'])[0]})"
            ) from None
        except Exception as error:  # a damaged file raises anything
            raise UnfitError(
                f"{path.name} cannot be read, it is damaged or not the whole file "
                f"({type(error).__name__}: {str(error).partition('. ')[0]})"
            ) from None
        if not isinstance(held, dict) or not all(
            isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in held.items()
        ):
            raise UnfitError(f"{path.name} is not a table of tensors by name")
        opened.append(held)
    if any(held.keys() != opened[0].keys() for held in opened):
        raise UnfitError(f"its {len(shards)} files hold tensors of different names")
    return opened


def _require_described(held: dict[str, "torch.Tensor"], settings: Settings) -> None:
    """UnfitError unless the number of layers, and the width of heads, are as the settings say.

    The model is built by the settings, and tensors fit with a wrong number of heads too.
    """
    numbers = {int(match[1]) for key in held if (match := re.match(r"layers\.(\d+)\.", key))}
    if len(numbers) != settings.n_layers:
        raise UnfitError(
            f"its {SETTINGS} says n_layers = {settings.n_layers}, and its files hold "
            f"{len(numbers)} layers: they are of two models, or not complete"
        )
    require_few_layers(len(numbers))
    frequencies, wanted = held.get(FREQUENCIES), settings.dim // settings.n_heads // 2
    if frequencies is not None and frequencies.numel() != wanted:
        raise UnfitError(
            f"its {SETTINGS} says n_heads = {settings.n_heads}, so a head turns by {wanted} "
            f"frequencies, and its files hold {frequencies.numel()} ({FREQUENCIES}): they are of two models"
        )


def _whole(ranks: list[dict[str, "torch.Tensor"]], config: Any, dtype: "torch.dtype") -> dict[str, "torch.Tensor"]:
    """The tensors of all ranks together, as transformers names and orders them."""
    import torch

    heads = {"attention.wq": config.num_attention_heads, "attention.wk": config.num_key_value_heads}
    tensors = {}
    for key in [key for key in ranks[0] if key != FREQUENCIES]:
        layer, target = _target(key)
        parts = [held[key] for held in ranks]
        try:
            if parts[0].dim() == 1:
                if any(not torch.equal(part, parts[0]) for part in parts):
                    raise UnfitError(f"its files differ in {key}: they are of two models")
                whole = parts[0]
            elif layer in BY_INPUT or (layer == "tok_embeddings" and len(parts[0]) == config.vocab_size):
                whole = torch.cat(parts, dim=1)
            else:
                whole = torch.cat(parts, dim=0)
            if layer in heads:
                whole = halves(whole, heads[layer])
        except RuntimeError as error:
            raise UnfitError(f"the parts of {key} do not fit together ({error})") from None
        tensors[target] = whole.to(dtype).contiguous()
    return tensors


def _target(key: str) -> tuple[str, str]:
    """The kind of layer that a tensor belongs to, and transformers' name for the tensor."""
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", key):
        layer, target = match[2], NAMES.get(match[2])
        target = target and f"model.layers.{match[1]}.{target}"
    else:
        layer = key.removesuffix(".weight")
        target = OUTSIDE.get(layer)
    if target is None:
        raise UnfitError(f"it holds a tensor {key}, which a Llama in Meta's layout does not have; {INSTEAD}")
    return layer, f"{target}.weight"


def halves(weight_OxI: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Reorder each head's rows from Meta's order (neighbours rotate together) to transformers' (two halves do)."""
    out, width = weight_OxI.shape
    return weight_OxI.view(heads, out // heads // 2, 2, width).transpose(1, 2).reshape(out, width)


def _tokenizer(folder: Path) -> tuple[Any, int]:
    """The tokenizer, converted by transformers, and how many words it has.

    UnfitError unless it is sentencepiece's BPE, and splits `PROBES` as sentencepiece itself does.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers import normalizers, processors
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    path = folder / TOKENIZER
    try:
        own = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UnfitError(f"{TOKENIZER} is not a model of sentencepiece ({error})") from None
    try:
        special = {
            f"{kind}_token": own.id_to_piece(number)
            for kind, number in (("unk", own.unk_id()), ("bos", own.bos_id()), ("eos", own.eos_id()))
        }
        backend = LlamaTokenizer(
            **LlamaTokenizer.convert_to_native_format(vocab_file=str(path), **special)
        ).backend_tokenizer
        # sentencepiece puts a space before a text that begins with one, and transformers' class does not.
        backend.pre_tokenizer = None
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        bos = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, own.bos_id())]
        )
        made = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
        agree = all(made(text, add_special_tokens=False).input_ids == own.encode(text) for text in PROBES)
    except Exception as error:  # a vocabulary that is not Llama's raises anything
        raise UnfitError(f"{TOKENIZER} cannot be converted ({error})") from None
    if not agree:
        raise UnfitError(f"{TOKENIZER}, once converted, would not split text as sentencepiece does; {INSTEAD}")
    return made, own.vocab_size()
