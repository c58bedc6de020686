"""The choice of a backend's module."""

from pipeline.infer.backend import Backend


def chosen(name: str) -> Backend:
    """The backend with this name (`generation.backend`). Others are not imported."""
    if name == "llama.cpp":
        from pipeline.infer import backend_llamacpp

        return backend_llamacpp
    if name == "vllm":
        from pipeline.infer import backend_vllm

        return backend_vllm
    from pipeline.infer import backend_transformers

    return backend_transformers
