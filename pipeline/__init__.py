"""lora-repro: did (Q)LoRA fine-tuning make this LLaMA-family model better, by how much, and can you get it again?

A room is what a stage needs, and each says what it may import: `tests/project/test_graph.py` holds them to it. Stages
speak through the files of `pipeline.core.paths` alone. Importing the package imports nothing heavy.
"""
