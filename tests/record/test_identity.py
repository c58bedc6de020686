"""What an experiment is: its parameters by dotted name, as the record, the card and comparisons show them."""

import json

from pipeline.core import params
from pipeline.record import identity
from tests import ROOT


def flat(value: object) -> dict[str, str]:
    return dict(identity.flat({"a": value}))


def test_items_that_have_names_stand_under_these() -> None:
    assert flat([{"name": "x", "b": 1}, {"name": "y-z", "b": [1, "two"]}]) == {"a.x.b": "1", "a.y-z.b": '[1, "two"]'}
    for kept in ([], [{"name": "x"}], [{"name": "x", "b": 1}, {"name": "x", "b": 2}], [{"name": 1, "b": 1}], ["x"]):
        assert flat(kept) == {"a": json.dumps(kept, sort_keys=True)}
    assert flat([{"name": "x/y", "b": 1}]) == {"a": '{"x/y": {"b": 1}}'}


def test_a_probe_of_forgetting_has_a_parameter_for_each_key() -> None:
    given = params.load(ROOT / "params.yaml").model_dump(mode="json")
    found = dict(identity.flat({"forget": given["forget"]}))
    keys = params.Probe.model_fields.keys() - {"name"}
    assert found.keys() == {f"forget.probes.{one['name']}.{key}" for one in given["forget"]["probes"] for key in keys}
