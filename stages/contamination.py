"""Stage contamination: the base without quantization reads the test references in their order and shuffled."""

from pipeline import contamination
from pipeline.core import params, paths, stage

if __name__ == "__main__":
    stage.run(
        "contamination",
        lambda declared: contamination.write_tested(declared[params.Contamination], declared[params.Runtime]),
        result=paths.CONTAMINATION,
    )
