"""Stage prepare: the data source becomes three splits and a card."""

from pipeline.core import params, paths, stage
from pipeline.prepare import prepare

if __name__ == "__main__":
    stage.run("prepare", lambda declared: prepare.write_splits(declared[params.Data]), result=paths.DATA_CARD)
