"""Meta's original layout of Llama checkpoints: `consolidated.NN.pth`, `params.json` and `tokenizer.model` in a folder.

Each `.pth` file holds one rank's part of every tensor, as the model-parallel layers of fairscale split them: the input
of a layer that ends a block (`wo`, `w2`) and the embedding's features, the output of all others; norms are in each rank
whole. Llama 3 splits the embedding's words instead, which its shape tells. Files are pickles: they are read by torch's
unpickler for weights alone, which refuses whatever could run code.

Rotary embeddings: Meta turns neighbours (0, 1), (2, 3)..., transformers element i with i + d/2 (RoFormer, arXiv
2104.09864, section 3.4.2, allows either), so the rows of the query and key projections change places within a head.
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
from pipeline.core.errors import UserError
from pipeline.model import checkpoint

if TYPE_CHECKING:
    import torch

SHARD = re.compile(r"consolidated\.(\d\d)\.pth")
SETTINGS, TOKENIZER, CHECKLIST = "params.json", "tokenizer.model", "checklist.chk"
BY_INPUT = ("attention.wo", "feed_forward.w2")
"""Layers whose input is split over the ranks; of the others it is the output."""
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
"""Of a layer; `tok_embeddings`, `norm` and `output` stand outside of them."""
FREQUENCIES = "rope.freqs"
"""What the settings' `rope_theta` says, as numbers, for one head: only how many there are is looked at."""
OUTSIDE = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
PROBES = ("The cat sat, didn't it?", "  two  spaces\n\tand a tab", "1234.5 % of x=y", "Grüße, 世界 🙂", "")
"""What the converted tokenizer has to split as sentencepiece does."""


class Settings(BaseModel):
    """`params.json`: whatever else it may say changes what is computed, so it is refused."""

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
        """The files do not say it, so it is told by what sets the releases apart: Code Llama, Llama 3, 2, 1."""
        if self.max_seq_len is not None:
            return self.max_seq_len
        by_base = {1e6: 16384, 5e5: 8192}
        return by_base.get(self.rope_theta, 4096 if self.norm_eps == 1e-5 else 2048)


def is_layout(folder: Path) -> bool:
    """Whether a folder is in Meta's layout, and not in the one of transformers as well."""
    return (folder / SETTINGS).is_file() and not (folder / "config.json").exists()


def load(folder: Path, name: str, dtype: "torch.dtype", check: Callable[[Any, Any], None]) -> tuple[Any, Any]:
    """The model in transformers' own class, in `dtype`, and its tokenizer. `name` is the source, for errors.

    `check` is given the model without weights and the tokenizer before the weights are read.

    UserError for what is missing, damaged, not of this layout, or not computed here.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = _settings(folder, name)
    _require_listed(folder, name)
    opened = _opened(_shards(folder, name), name)
    _require_described(opened[0], settings, name)
    tokenizer, words = _tokenizer(folder, name)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=words if settings.vocab_size == -1 else settings.vocab_size,
        hidden_size=settings.dim,
        intermediate_size=settings.feed_forward,
        num_hidden_layers=settings.n_layers,
        num_attention_heads=settings.n_heads,
        num_key_value_heads=settings.n_kv_heads or settings.n_heads,
        max_position_embeddings=settings.context,
        rms_norm_eps=settings.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": settings.rope_theta},
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        dtype=dtype,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    check(model, tokenizer)
    tensors = _whole(opened, config, dtype, name)
    shapes = {tensor: tuple(value.shape) for tensor, value in model.state_dict().items()}
    if lacking := sorted(shapes.keys() - tensors.keys()):
        raise UserError(
            f"model.source = {name!r} lacks {len(lacking)} of the model's tensors, such as {lacking[0]}; name a "
            "complete checkpoint"
        )
    for tensor, shape in shapes.items():
        if tuple(tensors[tensor].shape) != shape:
            raise UserError(
                f"model.source = {name!r}: {tensor} of its {len(opened)} files is {tuple(tensors[tensor].shape)}, but "
                f"{shape} by {SETTINGS} and {TOKENIZER}: they are of two models, or a file is missing"
            )
    model.load_state_dict(tensors, assign=True)
    # Its frequencies are no tensors of a checkpoint: they are computed, and were not on the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval(), tokenizer


def _settings(folder: Path, name: str) -> Settings:
    instead = "name the checkpoint in the Hugging Face layout instead"
    try:
        content = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        settings = Settings.model_validate(content)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        what = ".".join(map(str, problem["loc"]))
        why = (
            f"says {what} = {problem['input']!r}, which is not computed here"
            if problem["type"] == "extra_forbidden"
            else f"is no description of a Llama ({f'{what}: ' if what else ''}{problem['msg'].partition(' or ')[0]})"
        )
        raise UserError(f"model.source = {name!r}: its {SETTINGS} {why}; {instead}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"model.source = {name!r}: its {SETTINGS} is no JSON ({error})") from None
    if settings.dim % settings.n_heads or settings.n_heads % (settings.n_kv_heads or settings.n_heads):
        raise UserError(
            f"model.source = {name!r}: its {SETTINGS} says dim = {settings.dim}, n_heads = {settings.n_heads} and "
            f"n_kv_heads = {settings.n_kv_heads}, which do not divide each other"
        )
    return settings


def _require_listed(folder: Path, name: str) -> None:
    """UserError unless the files are what Meta's list of md5 sums beside them says, where it is there: parts that have
    changed places fit each other all the same."""
    checklist = folder / CHECKLIST
    if not checklist.is_file():
        return
    there = {path.name for path in folder.iterdir()}
    for line in checklist.read_text(encoding="utf-8", errors="replace").splitlines():
        md5, _, file = line.strip().partition(" ")
        file = file.strip().lstrip("*")
        # Whatever leads elsewhere is not there: nothing outside of the folder is read.
        if file and (file not in there or records.dvc_md5(folder / file) != md5):
            wrong = "is not what it lists" if file in there else "is listed, and not there"
            raise UserError(f"model.source = {name!r}: by its {CHECKLIST}, {file} {wrong}: download it again")


def _shards(folder: Path, name: str) -> list[Path]:
    """The files of all ranks, in their order."""
    found = {int(match[1]): path for path in folder.iterdir() if (match := SHARD.fullmatch(path.name))}
    if not found:
        raise UserError(f"model.source = {name!r} holds {SETTINGS} and no consolidated.00.pth: it lacks the weights")
    if missing := sorted(set(range(max(found) + 1)) - found.keys()):
        raise UserError(
            f"model.source = {name!r}: consolidated.{missing[0]:02}.pth is missing, one of {max(found) + 1} parts at "
            "least"
        )
    return [found[rank] for rank in sorted(found)]


def _opened(shards: list[Path], name: str) -> list[dict[str, "torch.Tensor"]]:
    """Of each rank the tensors by name, on the disk until they are used."""
    import torch

    opened = []
    for path in shards:
        with path.open("rb") as file:
            begins = file.read(64)
        if begins.startswith(b"version https://git-lfs"):
            raise UserError(
                f"model.source = {name!r}: {path.name} is a pointer of Git LFS in place of the file: run `git lfs "
                "pull` there, or download it again"
            )
        try:
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            # torch begins with how to read it all the same, which nobody should.
            told = [
                line.strip() for line in str(error).splitlines()[1:] if line.strip() and "file an issue" not in line
            ]
            raise UserError(
                f"model.source = {name!r}: {path.name} is no file of weights alone, or none at all, and could run code "
                f"when it is read, so it is not ({(told or ['no reason is given'])[0]})"
            ) from None
        except Exception as error:  # whatever a damaged file brings about
            raise UserError(
                f"model.source = {name!r}: {path.name} cannot be read, it is damaged or not the whole file "
                f"({type(error).__name__}: {str(error).partition('. ')[0]})"
            ) from None
        if not isinstance(held, dict) or not all(
            isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in held.items()
        ):
            raise UserError(f"model.source = {name!r}: {path.name} is no table of tensors by name")
        opened.append(held)
    if any(held.keys() != opened[0].keys() for held in opened):
        raise UserError(f"model.source = {name!r}: its {len(shards)} files hold tensors of different names")
    return opened


def _require_described(held: dict[str, "torch.Tensor"], settings: Settings, name: str) -> None:
    """UserError unless there are as many layers, and heads as wide, as the settings say: a wrong number of layers would
    be built, a wrong number of heads would fit all the same."""
    numbers = {int(match[1]) for key in held if (match := re.match(r"layers\.(\d+)\.", key))}
    if len(numbers) != settings.n_layers:
        raise UserError(
            f"model.source = {name!r}: its {SETTINGS} says n_layers = {settings.n_layers}, and its files hold "
            f"{len(numbers)} layers: they are of two models, or not complete"
        )
    if len(numbers) > checkpoint.MOST_LAYERS:
        raise UserError(f"model.source = {name!r} has {len(numbers):,} layers: {checkpoint.MOST_LAYERS:,} are the most")
    frequencies, wanted = held.get(FREQUENCIES), settings.dim // settings.n_heads // 2
    if frequencies is not None and frequencies.numel() != wanted:
        raise UserError(
            f"model.source = {name!r}: its {SETTINGS} says n_heads = {settings.n_heads}, so a head turns by {wanted} "
            f"frequencies, and its files hold {frequencies.numel()} ({FREQUENCIES}): they are of two models"
        )


def _whole(
    ranks: list[dict[str, "torch.Tensor"]], config: Any, dtype: "torch.dtype", name: str
) -> dict[str, "torch.Tensor"]:
    """The tensors as transformers names and orders them, of all ranks together."""
    import torch

    heads = {"attention.wq": config.num_attention_heads, "attention.wk": config.num_key_value_heads}
    tensors = {}
    for key in [key for key in ranks[0] if key != FREQUENCIES]:
        layer, target = _target(key, name)
        parts = [held[key] for held in ranks]
        try:
            if parts[0].dim() == 1:
                if any(not torch.equal(part, parts[0]) for part in parts):
                    raise UserError(f"model.source = {name!r}: its files differ in {key}: they are of two models")
                whole = parts[0]
            elif layer in BY_INPUT or (layer == "tok_embeddings" and len(parts[0]) == config.vocab_size):
                whole = torch.cat(parts, dim=1)
            else:
                whole = torch.cat(parts, dim=0)
            if layer in heads:
                whole = halves(whole, heads[layer])
        except RuntimeError as error:
            raise UserError(f"model.source = {name!r}: the parts of {key} do not fit together ({error})") from None
        tensors[target] = whole.to(dtype).contiguous()
    return tensors


def _target(key: str, name: str) -> tuple[str, str]:
    """The kind of layer that a tensor belongs to, and transformers' name for the tensor."""
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", key):
        layer, target = match[2], NAMES.get(match[2])
        target = target and f"model.layers.{match[1]}.{target}"
    else:
        layer = key.removesuffix(".weight")
        target = OUTSIDE.get(layer)
    if target is None:
        raise UserError(
            f"model.source = {name!r} holds a tensor {key}, which a Llama in Meta's layout does not have; name the "
            "checkpoint in the Hugging Face layout instead"
        )
    return layer, f"{target}.weight"


def halves(weight_OxI: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Rows of each head from Meta's order, in which neighbours are turned together, to that of the two halves."""
    out, width = weight_OxI.shape
    return weight_OxI.view(heads, out // heads // 2, 2, width).transpose(1, 2).reshape(out, width)


def _tokenizer(folder: Path, name: str) -> tuple[Any, int]:
    """The tokenizer, converted by transformers, and how many words it has.

    UserError unless it is sentencepiece's, by pairs, and splits `PROBES` as sentencepiece itself does.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers import normalizers, processors
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    path = folder / TOKENIZER
    if not path.is_file():
        raise UserError(f"model.source = {name!r}: {TOKENIZER} is missing beside {SETTINGS}")
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", path.read_bytes()[:4096]):
        raise UserError(
            f"model.source = {name!r}: {TOKENIZER} is in tiktoken's format (Llama 3), which holds neither the special "
            "tokens nor how text is split; name the checkpoint in the Hugging Face layout instead"
        )
    try:
        own = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"model.source = {name!r}: {TOKENIZER} is no model of sentencepiece ({error})") from None
    try:
        special = {
            f"{kind}_token": own.id_to_piece(number)
            for kind, number in (("unk", own.unk_id()), ("bos", own.bos_id()), ("eos", own.eos_id()))
        }
        backend = LlamaTokenizer(
            **LlamaTokenizer.convert_to_native_format(vocab_file=str(path), **special)
        ).backend_tokenizer
        # transformers puts no space before a text that begins with one; sentencepiece does, so a plain class keeps it.
        backend.pre_tokenizer = None
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        bos = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, own.bos_id())]
        )
        made = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
        agree = all(made(text, add_special_tokens=False).input_ids == own.encode(text) for text in PROBES)
    except Exception as error:  # whatever a vocabulary that is none of Llama's brings about
        raise UserError(f"model.source = {name!r}: {TOKENIZER} cannot be converted ({error})") from None
    if not agree:
        raise UserError(
            f"model.source = {name!r}: {TOKENIZER}, once converted, would split text in another way than sentencepiece "
            "does; name the checkpoint in the Hugging Face layout instead"
        )
    return made, own.vocab_size()
