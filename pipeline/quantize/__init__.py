"""Stage quantize: the base in fewer bits, and what that costs in quality.

It imports core and model. How a quantized base is held, loaded and unpacked is in `model`, since every later stage
needs it; how its codes are found is here.
"""
