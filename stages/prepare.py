"""Stage prepare: the data source becomes three splits and a card."""

from pipeline import data, params, stage

if __name__ == "__main__":
    stage.run("prepare", lambda declared: data.prepare(declared[params.Data]), label="prepare")
