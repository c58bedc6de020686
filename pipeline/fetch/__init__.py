"""Any source of a model becomes one checkpoint, in safetensors, with its tokenizer and its facts.

It imports core, sources and model. Whatever is particular to a format that others write is here, and nowhere else.
"""
