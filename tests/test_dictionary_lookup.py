"""GATv2's DictionaryLookup: every scoring function learns it but a static one, which cannot."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from test_examples import EXAMPLES, run

from regard import scores


def test_every_score_looks_everything_up_but_a_static_one(tmp_path: Path) -> None:
    said = run(EXAMPLES[0].with_name("dictionary_lookup.py"), tmp_path)
    accuracy = {name: float(right) for name, right in re.findall(r"^(.+?) +(\d\.\d{4})$", said, re.MULTILINE)}
    assert accuracy.pop("static GAT") <= 0.1
    public = {name for name, each in inspect.getmembers(scores, inspect.isclass) if issubclass(each, scores.Score)}
    assert {name for name in public if not name.startswith("_")} - {"Score", "FunctionScore"} == set(accuracy)
    assert set(accuracy.values()) == {1.0}
