"""The worker of `pipeline.infer.backend_vllm`. It runs in an environment with vLLM, so it imports no other module here.

It reads one line of JSON with its setup, then lines with prompts, and answers each with one line of JSON.
"""

import json
import os
import sys
from typing import Any


def main() -> None:
    # vLLM also writes to standard output, so that is redirected to standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    setup = json.loads(sys.stdin.readline())
    try:
        import torch
        from vllm import LLM, SamplingParams, TokensPrompt, __version__
        from vllm.lora.request import LoRARequest
    except ImportError as error:
        tell({"error": f"{sys.executable} has no usable vLLM ({error})"})
        return
    if not torch.cuda.is_available():
        tell({"error": f"the torch {torch.__version__} of {sys.executable} finds no CUDA device"})
        return
    lora = LoRARequest("adapter", 1, setup["adapter"]) if setup["adapter"] else None
    options = {"enable_lora": True, "max_lora_rank": setup["rank"], "max_loras": 1} if lora else {}
    llm = LLM(
        model=setup["model"],
        dtype=setup["dtype"],
        max_model_len=setup["tokens"],
        max_num_seqs=setup["rows"],
        enable_prefix_caching=True,
        skip_tokenizer_init=True,
        trust_remote_code=False,
        # By default it would take temperature and the like from the model's own configuration.
        generation_config="vllm",
        seed=0,
        **options,
    )
    greedy = {"temperature": 0.0, "detokenize": False, "ignore_eos": True}

    def likely(adapter: Any) -> Any:
        sampling = SamplingParams(max_tokens=1, logprobs=5, **greedy)
        told = llm.generate([TokensPrompt(prompt_token_ids=setup["probe"])], sampling, lora_request=adapter)
        return {token: one.logprob for token, one in told[0].outputs[0].logprobs[0].items()}

    if lora and likely(lora) == likely(None):
        tell({"error": f"{setup['adapter']} does not change what vLLM computes: it is not applied"})
        return
    tell({"version": __version__})
    sampling = SamplingParams(max_tokens=setup["new_tokens"], stop_token_ids=setup["stops"], **greedy)
    for line in sys.stdin:
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in json.loads(line)]
        found = llm.generate(prompts, sampling, lora_request=lora, use_tqdm=False)
        tell([{"prompt": list(one.prompt_token_ids), "new": list(one.outputs[0].token_ids)} for one in found])


if __name__ == "__main__":
    main()
