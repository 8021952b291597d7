"""The order of passes follows from facts."""

from typing import ClassVar

import pytest

from moefx.errors import PlanError
from moefx.passes.analysis.site import Kind, Site
from moefx.passes.rewrite import Context, Contract, Costs, Edit, SitePass, get_pass
from moefx.passes.rewrite.order import in_order


class _Toy(SitePass):
    name = "toy"
    summary = "a pass that only has facts"
    site_kind: ClassVar[Kind] = "ffn"

    def refusal(self, site: Site) -> str:
        return "never applied"

    def contract(self) -> Contract:
        return Contract("exact", 0.0, "never applied")

    def costs(self, site: Site, tap_width: int = 0) -> Costs:
        return Costs(0, 0, 0, 0)

    def edit(self, context: Context) -> Edit:
        raise AssertionError("never applied")


class _Reader(_Toy):
    name = "reader"
    requires = frozenset({"ffn-sites"})
    preserves = frozenset({"ffn-sites", "attention-sites", "block-sites"})


class _Needs(_Toy):
    name = "needs"
    requires = frozenset({"routed-ffns"})
    preserves = frozenset({"ffn-sites", "attention-sites", "block-sites"})


def test_order_is_kept_where_facts_allow_it() -> None:
    rules = [get_pass(name)() for name in ("mixture-of-depths", "upcycle", "mixture-of-heads")]
    assert in_order(rules) == rules


def test_a_reader_of_a_fact_runs_before_it_is_ended() -> None:
    upcycle, reader = get_pass("upcycle")(), _Reader()
    assert in_order([upcycle, reader]) == [reader, upcycle]


def test_a_fact_is_provided_first() -> None:
    upcycle, needs = get_pass("upcycle")(), _Needs()
    assert in_order([needs, upcycle]) == [upcycle, needs]


def test_passes_that_exclude_each_other_are_named() -> None:
    with pytest.raises(PlanError, match="ffn-sites"):
        in_order([get_pass("upcycle")(), get_pass("upcycle")()])


def test_a_fact_that_nothing_provides_is_named() -> None:
    with pytest.raises(PlanError, match="routed-ffns"):
        in_order([_Needs()])
