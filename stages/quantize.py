"""Stage quantize: the base is quantized, and the loss of quality is measured."""

from pipeline.core import params, paths, stage
from pipeline.quantize import quantize

if __name__ == "__main__":
    stage.run(
        "quantize",
        lambda declared: quantize.write_quantized(declared[params.Quantize], declared[params.Runtime]),
        result=paths.QUANTIZED_FACTS,
    )
