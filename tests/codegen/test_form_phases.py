"""Phases respect dependencies, and region calls share theirs with nobody."""

from aios_compile.codegen.form_phases import form_phases


def test_independent_items_share_a_phase() -> None:
    assert form_phases(["a", "b"], {"a": [], "b": []}) == {"a": 0, "b": 0}


def test_a_dependent_item_comes_after() -> None:
    phases = form_phases(["a", "b", "c"], {"a": [], "b": ["a"], "c": []})
    assert phases == {"a": 0, "b": 1, "c": 0}


def test_a_solitary_item_separates_what_is_before_from_what_is_after() -> None:
    items = ["a", "call", "b", "c"]
    phases = form_phases(items, {"a": [], "call": [], "b": [], "c": ["b"]}, alone=["call"])
    assert phases == {"a": 0, "call": 1, "b": 2, "c": 3}
