"""GGUF files of small models, written by the gguf library."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.fetch import gguf_layout

GGUF_SIZES: dict[str, dict[str, Any]] = {
    # Room for the token that transformers adds to every tokenizer of Qwen 2; heads as large as Qwen 3's always are.
    "qwen2": {"vocab_size": 320},
    "qwen3": {"vocab_size": 320, "head_dim": 128},
    # As Gemma 3's: five layers with a window, the sixth without, scores scaled by heads of 256.
    "gemma3": {
        "vocab_size": 320, "head_dim": 256, "query_pre_attn_scalar": 256, "num_hidden_layers": 6, "layer_types": None,
        "sliding_window": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
    },
}  # fmt: skip
WINDOW: dict[str, Any] = {"attention.sliding_window": 16, "attention.key_length": 256, "attention.value_length": 256}


def write_gguf(
    folder: Path,
    file: Path,
    family: str = "llama",
    kind: str = "F32",
    words: Path | None = None,
    template: str | None = None,
    **more: Any,
) -> dict[str, torch.Tensor]:
    """A checkpoint as a GGUF file whose matrices are of a type; gives what they hold, by transformers' names.

    `words`: a sentencepiece model with a chat `template`, else the tokenizer of the checkpoint. `more`: header fields
    of the family.
    """
    import gguf

    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    writer = gguf.GGUFWriter(file, family)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    rotation = config.rope_parameters
    writer.add_rope_freq_base(rotation.get("full_attention", rotation)["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name, value in more.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        (writer.add_uint32 if isinstance(value, int) else add)(f"{family}.{name}", value)
    if words:
        _sentencepiece(writer, words)
        if template:
            writer.add_chat_template(template)
    else:
        _pairs(writer, AutoTokenizer.from_pretrained(folder), folder, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], config.num_hidden_layers)
    held = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.float().numpy()
        if family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            # GGUF stores the two halves of a rotary head interleaved.
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        if family == "gemma3" and name.endswith("norm.weight"):
            array = array + 1
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert mapped is not None
        if name.endswith(".bias") and not mapped.endswith(".bias"):
            mapped += ".bias"
        of = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        stored = blocks(array, of)
        writer.add_tensor(mapped, stored, raw_dtype=of)
        array = gguf.dequantize(stored, of)
        if family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            array = array.reshape(heads, -1, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        if family == "gemma3" and name.endswith("norm.weight"):
            array = array - 1
        held[name] = torch.from_numpy(array.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


SCALES = {"Q2_K": (80, 84), "Q3_K": (108, 110), "Q4_K": (0, 4), "Q5_K": (0, 4), "Q6_K": (208, 210)} | {
    kind: (0, 2) for kind in gguf_layout.GGUF_TYPES if kind.startswith("IQ")
}
"""Where the half-precision scales of a block stand; the gguf library reads these types and writes none."""


def blocks(array: Any, of: Any) -> Any:
    import gguf
    import numpy as np

    if of.name not in SCALES:
        return gguf.quantize(array, of)
    elements, size = gguf.GGML_QUANT_SIZES[of]
    draw = np.random.default_rng(len(array))
    raw = draw.integers(0, 256, (*array.shape[:-1], array.shape[-1] // elements, size), dtype=np.uint8)
    start, end = SCALES[of.name]
    scales = draw.uniform(1e-4, 3e-4, (*raw.shape[:-1], (end - start) // 2)).astype(np.float16)
    raw[..., start:end] = scales.view(np.uint8)
    return raw.reshape(*array.shape[:-1], -1)


def _pairs(writer: Any, tokenizer: Any, folder: Path, size: int) -> None:
    writer.add_tokenizer_model("gpt2")
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    # A vocabulary may be embedded in more rows than it has words.
    extra = [f"[PAD{number}]" for number in range(len(vocabulary), size)]
    writer.add_token_list([token for token, _ in vocabulary] + extra)
    types = [3 if index in tokenizer.added_tokens_decoder else 1 for _, index in vocabulary]
    writer.add_token_types(types + [5] * len(extra))
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_unk_token_id(tokenizer.bos_token_id)  # without one, transformers would add a token of its own
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def _sentencepiece(writer: Any, words: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    own = SentencePieceProcessor(model_file=str(words))
    numbers = range(own.vocab_size())
    writer.add_tokenizer_model("llama")
    writer.add_token_list([own.id_to_piece(n) for n in numbers])
    writer.add_token_scores([own.get_score(n) for n in numbers])
    kinds = (("is_unknown", 2), ("is_control", 3), ("is_byte", 6))
    writer.add_token_types([next((kind for of, kind in kinds if getattr(own, of)(n)), 1) for n in numbers])
    writer.add_bos_token_id(own.bos_id())
    writer.add_eos_token_id(own.eos_id())
    writer.add_unk_token_id(own.unk_id())
