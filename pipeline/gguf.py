"""GGUF, the file format of llama.cpp: base, adapter and merged model, written with the `gguf` library.

GGUF has no type for NF4. So a base in 4 bits is written with the unpacked values that its layers compute with, and both
backends multiply by the same numbers. LoRA becomes a separate adapter file. There llama.cpp scales each B A by alpha /
its rank: with rslora, whose scale is alpha / sqrt(r), the file's alpha is alpha * sqrt(r). Where a layer's own rank or
alpha asks for another scale, its B is multiplied by what is missing.

For Llama, llama.cpp rotates pairs of neighbouring dimensions, where transformers rotates the two halves of a head. So
the rows of q_proj and k_proj are reordered, and those of the adapter's B. For Qwen both rotate halves.

Dimensions: O and I a layer's outputs and inputs, R the adapter's rank.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core import params, records
from pipeline.core.errors import UserError
from pipeline.model import adapted, checkpoint, packed
from pipeline.model.shape import Shape

if TYPE_CHECKING:
    import torch

Array = NDArray[Any]

HEAD_TYPES = dict.fromkeys(("Q5_1", "Q5_0", "Q4_1", "Q4_0"), "Q8_0")
"""The type of the output head in files of 4 and 5 bits; also of the embedding, if the two are one.

llama.cpp's quantizer (src/llama-quant.cpp, `llama_tensor_get_type_impl`) takes Q6_K, or Q8_0 if rows do not fill blocks
of 256, and gives a separate embedding the file's type. `gguf` cannot quantize to Q6_K.
"""

ADAPTER_TYPES = ("F32", "BF16", "F16")
"""An adapter is small: rounding it to blocks of 4 or 8 bits would lose more than it saves."""

FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""transformers' families that can be written, and llama.cpp's names for them.

For each, tests/infer/test_backend_llamacpp.py compares the texts that llama.cpp and transformers decode with a small
random model, with and without an adapter.
"""

ROTATE_NEIGHBOURS = ("llama", "mistral")
"""Families whose q and k rows are put in the order of llama.cpp's rotation."""

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {WORDS + r"\p{N}{1,3}" + REST: "llama-bpe", WORDS + r"\p{N}" + REST: "qwen2"}
"""The expressions by which Llama 3's and Qwen 2's tokenizers split text, and llama.cpp's names for them."""
SENTENCEPIECE = "sentencepiece"


def write_base(folder: Path, path: Path, kind: str) -> None:
    """Write the checkpoint in `folder`, in the hub's layout, with its tokenizer as one GGUF file.

    `kind` is one of `params.GGUF_TYPES`. UserError as of `refuse`, and if the layers' inputs do not fill whole blocks
    of `kind`.
    """
    _write_model(folder, path, kind, None)


def write_merged(folder: Path, adapter: Path, path: Path, kind: str) -> None:
    """Like `write_base`, with the update of the PEFT adapter in `adapter` added to the weights in float32."""
    _write_model(folder, path, kind, _read_lora(adapter))


def write_adapter(adapter: Path, base: Path, path: Path, kind: str) -> None:
    """Write the PEFT adapter in `adapter` as a GGUF adapter for the base in `base`, whose configuration is read.

    `kind` is one of `ADAPTER_TYPES`. UserError for what a GGUF adapter cannot hold: anything but plain LoRA of the
    linear layers.
    """
    import gguf

    if kind not in ADAPTER_TYPES:
        raise UserError(f"an adapter is written as {', '.join(ADAPTER_TYPES)}, not as {kind!r}")
    checkpoint = _Checkpoint.read(base)
    lora = _read_lora(adapter)
    with records.replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, checkpoint.architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, lora.alpha)
        tensors: list[tuple[str, Array]] = []
        for name, (a_RxI, b_OxR) in sorted(lora.pairs.items()):
            target = checkpoint.name(name)
            missing = lora.scales[name] * len(a_RxI) / lora.alpha
            b_OxR = b_OxR if math.isclose(missing, 1) else b_OxR * np.float32(missing)
            tensors += [(f"{target}.lora_a", a_RxI), (f"{target}.lora_b", checkpoint.ordered(name, b_OxR))]
        _write(writer, [(name, array.shape, kind) for name, array in tensors], (array for _, array in tensors))


def stored(kind: str) -> str:
    """A file's type in words, with the type of the head if it differs."""
    return f"{kind} with the output head in {HEAD_TYPES[kind]}" if kind in HEAD_TYPES else kind


def refuse_adapter(adapter: Path) -> dict[str, Any]:
    """The configuration of the PEFT adapter in `adapter`. UserError unless it is plain LoRA. No weights are read."""
    config: dict[str, Any] = records.read_json(adapter / "adapter_config.json")
    asked = (
        "use_dora", "lora_bias", "fan_in_fan_out", "modules_to_save", "target_parameters", "use_qalora", "use_bdlora",
        "layer_replication", "trainable_token_indices",
    )  # fmt: skip
    held = [name for name in asked if config.get(name)]
    if (bias := config.get("bias", "none")) != "none":
        held.append(f"bias {bias}")
    if config.get("peft_type") != "LORA" or held:
        raise UserError(
            f"{adapter} is not plain LoRA ({', '.join(held) or config.get('peft_type')}), and a GGUF adapter holds "
            "nothing else: export it as adapter or merged"
        )
    return config


def refuse(folder: Path) -> None:
    """UserError with the reason if the checkpoint in `folder` cannot be written; its weights are not read."""
    checkpoint = _Checkpoint.read(folder)
    checkpoint.rotation()
    _Vocabulary.read(folder, checkpoint.config)


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint's configuration in GGUF's terms."""

    folder: Path
    config: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "_Checkpoint":
        """UserError for a checkpoint whose layers llama.cpp would compute differently."""
        config = records.read_json(folder / "config.json")
        family = config["model_type"]
        if family not in FAMILIES:
            raise UserError(
                f"{folder} is a model of family {family!r}, and GGUF files are written only of "
                f"{', '.join(FAMILIES)}: for it, set generation.backend to transformers, and export adapter or merged"
            )
        if (config.get("quantization_config") or {}).get("load_in_8bit"):
            raise UserError(
                f"{folder} is quantized by LLM.int8(), which quantizes activations as well: a GGUF file would compute "
                "other numbers; set quantize.method to nf4, fp4, gptq, hqq or none"
            )
        if config["hidden_act"] != "silu":
            raise UserError(f"{folder} has the activation {config['hidden_act']!r}, where llama.cpp computes silu")
        return cls(folder, config)

    @property
    def family(self) -> str:
        return str(self.config["model_type"])

    @property
    def architecture(self) -> str:
        return FAMILIES[self.family]

    @property
    def shape(self) -> Shape:
        return Shape.of(self.config)

    def name(self, name: str) -> str:
        """GGUF's name of one of transformers' tensors, or of a module's weight."""
        import gguf

        architecture = next(one for one, text in gguf.MODEL_ARCH_NAMES.items() if text == self.architecture)
        names = gguf.get_tensor_name_map(architecture, self.config["num_hidden_layers"])
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UserError(f"{self.folder}: GGUF has no name for its tensor {name}")
        return str(found)

    def ordered(self, name: str, array_Ox: Array) -> Array:
        """The rows of a q or k projection (weight, bias or adapter's B) in the order of llama.cpp's rotation."""
        part = next((one for one in ("q_proj", "k_proj") if f".{one}." in name), None)
        if part is None or self.family not in ROTATE_NEIGHBOURS:
            return array_Ox
        heads = self.shape.attention_heads if part == "q_proj" else self.shape.key_value_heads
        halves = array_Ox.reshape(heads, 2, len(array_Ox) // heads // 2, *array_Ox.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array_Ox.shape))

    def rotation(self) -> tuple[float, Array | None]:
        """The base of the rotary frequencies, and Llama 3's divisors for them; UserError for other scalings.

        Llama 3.1 (arXiv 2407.21783) divides low frequencies by a factor, and middle ones by a part of it.
        """
        rope = self.config.get("rope_parameters") or {}
        kind, theta = rope.get("rope_type", "default"), float(rope.get("rope_theta", 10_000.0))
        if kind == "default":
            return theta, None
        if kind != "llama3":
            raise UserError(
                f"{self.folder} scales its rotary embedding by {kind!r}, which is not written to GGUF files; only "
                "llama3 is, and none at all"
            )
        width = self.shape.head_dim
        wave = 2 * math.pi * theta ** (np.arange(0, width, 2, dtype=np.float64) / width)
        context, factor = rope["original_max_position_embeddings"], rope["factor"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        share = (context / wave - low) / (high - low)
        between = 1 / ((1 - share) / factor + share)
        factors = np.where(wave < context / high, 1.0, np.where(wave > context / low, factor, between))
        return theta, factors.astype(np.float32)


@dataclass(frozen=True)
class _Lora:
    """An adapter: `pairs` maps transformers' name of a weight to A (RxI) and B (OxR), in float32, and `scales` to the
    factor of B A. `alpha` is the product of rank and scale in a layer without a rank or alpha of its own."""

    alpha: float
    pairs: dict[str, tuple[Array, Array]]
    scales: dict[str, float]


def _read_lora(adapter: Path) -> _Lora:
    """UserError unless it is plain LoRA of the blocks' linear layers."""
    from safetensors import safe_open

    config = refuse_adapter(adapter)
    halves: dict[str, dict[str, Array]] = {}
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  # not a mapping
            layer, _, half = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
            halves.setdefault(f"{layer}.weight", {})[half] = values = file.get_tensor(key).float().numpy()
            if not np.isfinite(values).all():
                raise UserError(f"{adapter}: {key} holds NaN or infinity")
    for name, pair in halves.items():
        if ".layers." not in name or set(pair) != {"A", "B"}:
            raise UserError(f"{adapter} adapts {name}, which is not a linear layer of a block: a GGUF adapter cannot")

    def scale(alpha: float, rank: int) -> float:
        return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank

    own = config.get("alpha_pattern") or {}
    return _Lora(
        alpha=scale(config["lora_alpha"], config["r"]) * config["r"],
        pairs={name: (pair["A"], pair["B"]) for name, pair in halves.items()},
        scales={
            name: scale(
                own.get(adapted.pattern_of(own, name.removesuffix(".weight")), config["lora_alpha"]), len(pair["A"])
            )
            for name, pair in halves.items()
        },
    )


def _write_model(folder: Path, path: Path, kind: str, lora: _Lora | None) -> None:
    import gguf

    if kind not in params.GGUF_TYPES:
        raise UserError(f"a GGUF file is written as {', '.join(params.GGUF_TYPES)}, not as {kind!r}")
    checkpoint = _Checkpoint.read(folder)
    theta, factors = checkpoint.rotation()
    vocabulary = _Vocabulary.read(folder, checkpoint.config)
    tensors = weights(folder)
    pairs = lora.pairs if lora else {}
    if unknown := sorted(set(pairs) - set(tensors)):
        raise UserError(f"the adapter changes {unknown[0]}, which {folder} does not have")
    config, shape = checkpoint.config, checkpoint.shape
    with records.replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, checkpoint.architecture)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_file_type(_file_type(kind))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_context_length(shape.context)
        writer.add_embedding_length(shape.hidden_size)
        writer.add_block_count(shape.layers)
        writer.add_feed_forward_length(shape.intermediate_size)
        writer.add_head_count(shape.attention_heads)
        writer.add_head_count_kv(shape.key_value_heads)
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
        writer.add_rope_dimension_count(shape.head_dim)
        writer.add_rope_freq_base(theta)
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_vocab_size(shape.vocabulary)
        vocabulary.write(writer)
        head = "lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight"
        kinds = dict.fromkeys(tensors, kind) | {head: HEAD_TYPES.get(kind, kind)}
        listed = [(checkpoint.name(name), tuple(tensor.shape), kinds[name]) for name, tensor in tensors.items()]
        if factors is not None:
            listed.insert(0, ("rope_freqs.weight", factors.shape, "F32"))

        def arrays() -> Iterator[Array]:
            if factors is not None:
                yield factors
            for name, tensor in tensors.items():
                array = tensor.float().numpy()
                if lora and name in pairs:
                    a_RxI, b_OxR = pairs[name]
                    array = array + lora.scales[name] * (b_OxR @ a_RxI)
                yield checkpoint.ordered(name, array)

        _write(writer, listed, arrays())


def weights(folder: Path) -> dict[str, "torch.Tensor"]:
    """A checkpoint's tensors by name, as its layers compute with them; without a head that is the embedding."""
    import torch

    from pipeline.model import devices

    devices.quieten()
    model = checkpoint.pretrained(folder, torch.device("cpu"))
    packed.dequantize(model)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}


def _write(writer: Any, listed: Sequence[tuple[str, tuple[int, ...], str]], arrays: Iterator[Array]) -> None:
    """Write the file. `listed`: the name, shape and type of each tensor; `arrays`: their values, in the same order.

    Vectors stay in float32, as llama.cpp expects. Only one tensor at a time is held in its new type.
    """
    import gguf

    kinds = []
    for name, shape, kind in listed:
        type_ = gguf.GGMLQuantizationType[kind if len(shape) > 1 else "F32"]
        block, size = gguf.GGML_QUANT_SIZES[type_]
        if shape[-1] % block:
            raise UserError(
                f"{name} has rows of {shape[-1]} weights, which do not fill the blocks of {block} that types of 8 bits "
                "and fewer have: take F16"
            )
        kinds.append(type_)
        count = math.prod(shape) // block * size
        writer.add_tensor_info(name, shape, np.dtype(np.float32), count, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for array, type_ in zip(arrays, kinds, strict=True):
        writer.write_tensor_data(gguf.quants.quantize(np.ascontiguousarray(array, np.float32), type_))
    writer.close()


def _file_type(kind: str) -> int:
    """The number that stands for `kind` in a file's header."""
    import gguf

    return int(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])


@dataclass(frozen=True)
class _Vocabulary:
    """A tokenizer in GGUF's terms: byte-level BPE, with the name of how it splits text, or SentencePiece's BPE.

    `texts` and `types` are by token id. `scores` are SentencePiece's alone (Llama 2), made of the order of its merges:
    llama.cpp joins the pair that makes the token of the highest score.
    """

    tokenizer: Any
    pre_tokenizer: str
    texts: list[str]
    types: list[Any]
    merges: list[str]
    scores: list[float] | None
    ends: list[int]

    @classmethod
    def read(cls, folder: Path, config: dict[str, Any]) -> "_Vocabulary":
        """UserError for a tokenizer that llama.cpp would not follow."""
        import gguf

        tokenizer = checkpoint.tokenizer(folder)
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        model = content["model"]
        kind = _pre_tokenizer(content, folder)
        texts, types = _tokens(content, config["vocab_size"])
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        scores = None
        if kind == SENTENCEPIECE:
            ranks: dict[str, int] = {}
            for rank, pair in enumerate(pairs):
                ranks.setdefault("".join(pair), rank)
            scores = [float(-ranks.get(text, len(pairs))) for text in texts]
            for number, text in enumerate(texts):
                if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
                    types[number] = gguf.TokenType.BYTE
            if model["unk_token"] is not None:
                types[model["vocab"][model["unk_token"]]] = gguf.TokenType.UNKNOWN
        merges = [" ".join(pair) for pair in pairs]
        return cls(tokenizer, kind, texts, types, merges, scores, stops(folder, config, tokenizer))

    def write(self, writer: Any) -> None:
        """Write the tokenizer into a file's header."""
        from pipeline.model import prompt

        tokenizer = self.tokenizer
        writer.add_tokenizer_model("gpt2" if self.scores is None else "llama")
        writer.add_tokenizer_pre(self.pre_tokenizer if self.scores is None else "default")
        writer.add_token_list(self.texts)
        writer.add_token_types(self.types)
        if self.scores is None:
            writer.add_token_merges(self.merges)
        else:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix("\u2581" in "".join(tokenizer.tokenize("a")))
        if tokenizer.bos_token_id is not None:
            writer.add_bos_token_id(tokenizer.bos_token_id)
        ending = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
        for add, end in zip(ending, self.ends):  # noqa: B905  # a model has one to three
            add(end)
        if tokenizer.unk_token_id is not None:
            writer.add_unk_token_id(tokenizer.unk_token_id)
        if tokenizer.pad_token_id is not None:
            writer.add_pad_token_id(tokenizer.pad_token_id)
        writer.add_add_bos_token(prompt.starts_with_bos(tokenizer))
        if isinstance(tokenizer.chat_template, str):
            writer.add_chat_template(tokenizer.chat_template)


def _tokens(content: dict[str, Any], size: int) -> tuple[list[str], list[Any]]:
    """The text and the type of each of `size` tokens; those that the tokenizer lacks are padding."""
    import gguf

    texts = [f"[PAD{number}]" for number in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for text, number in content["model"]["vocab"].items():
        texts[number], types[number] = text, gguf.TokenType.NORMAL
    for added in content["added_tokens"]:
        if added["id"] < size:
            texts[added["id"]] = added["content"]
            types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    return texts, types


def stops(folder: Path, config: dict[str, Any], tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's EOS, and those of the model's authors."""
    file = folder / "generation_config.json"
    ids = (records.read_json(file) if file.is_file() else {}).get("eos_token_id", config.get("eos_token_id"))
    listed = [ids] if isinstance(ids, int) else ids or []
    own = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    return list(dict.fromkeys([*own, *listed]))


def _pre_tokenizer(content: dict[str, Any], folder: Path) -> str:
    """llama.cpp's name for how a tokenizer splits text before BPE, or `SENTENCEPIECE`."""
    model, normalizer, steps = content["model"], content["normalizer"], content["pre_tokenizer"]
    reason = ""
    if model["type"] != "BPE":
        reason = f"a {model['type']} model"
    elif model.get("byte_fallback"):
        spaces = json.dumps([normalizer, steps], ensure_ascii=False)
        if "\u2581" in spaces and not model.get("ignore_merges"):
            return SENTENCEPIECE
        reason = "byte fallback without SentencePiece's spaces"
    elif normalizer not in (None, {"type": "NFC"}):
        reason = f"the normalizer {normalizer['type']}"
    else:
        steps = (steps or {}).get("pretokenizers", [steps])
        kinds = [step["type"] for step in steps if step]
        if kinds == ["ByteLevel"] and steps[0].get("use_regex") and not steps[0].get("add_prefix_space"):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not steps[1]["use_regex"]:
            expression = (steps[0]["pattern"] or {}).get("Regex", "")
            name = SPLITS.get(expression)
            if name is not None and bool(model.get("ignore_merges")) == (name == "llama-bpe"):
                return name
            reason = f"the expression {expression}"
        else:
            reason = f"the steps {', '.join(kinds) or 'none'}"
    raise UserError(
        f"the tokenizer in {folder} splits text by {reason}, for which no name of llama.cpp is known here: with a GGUF "
        "file it would split text differently; set generation.backend to transformers"
    )
