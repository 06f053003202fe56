from __future__ import annotations

from rlpipe.observe.metrics import describe


def test_a_name_is_described_by_itself_or_by_its_prefix() -> None:
    assert "seconds" in describe("time/anything")
    assert describe("mismatch/max_abs") != describe("mismatch/mean_abs")
    assert describe("unheard/of") == ""
