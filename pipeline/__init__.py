"""lora-repro: did (Q)LoRA fine-tuning make this LLaMA-family model better, by how much, and can you get it again?

One noun a module. Modules speak to each other through the records of `pipeline.records`; stages speak through
the files of `pipeline.paths` alone. Importing the package imports nothing heavy.
"""
