"""Stage quantize: the base is quantized, and the loss of quality is measured."""

from pipeline import quantize
from pipeline.core import params, paths, stage

if __name__ == "__main__":
    stage.run(
        "quantize",
        lambda declared: quantize.write_quantized(declared[params.Quantize], declared[params.Runtime]),
        result=paths.QUANTIZED_FACTS,
    )
