"""The choice of the module that decodes, by `generation.backend`."""

from pipeline.infer.backend import Backend


def chosen(name: str) -> Backend:
    """The backend of that name."""
    if name == "llama.cpp":
        from pipeline.infer import backend_llamacpp

        return backend_llamacpp
    if name == "vllm":
        from pipeline.infer import backend_vllm

        return backend_vllm
    from pipeline.infer import backend_transformers

    return backend_transformers
