"""Stage infer-unquantized: the base without quantization answers rows of the split. It needs no quantization."""

from pipeline.core import baseline, params, paths
from pipeline.infer import infer
from pipeline.model import processes


def main(declared: params.Declared) -> None:
    off = baseline.unquantized_off(declared.value("baseline.unquantized"), declared.value("quantize.method"))
    prompt, generation, runtime = declared[params.Prompt], declared[params.Generation], declared[params.Runtime]
    infer.decode_unquantized(off, declared.value("baseline.rows"), prompt, generation, runtime, declared.split)


if __name__ == "__main__":
    processes.run("infer-unquantized", main, result=paths.predictions(paths.UNQUANTIZED))
