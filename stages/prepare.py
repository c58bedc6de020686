"""Stage prepare: the data source becomes three splits and a card."""

from pipeline import data, params, paths, stage

if __name__ == "__main__":
    stage.run("prepare", lambda declared: data.prepare(declared[params.Data]), result=paths.DATA_CARD)
