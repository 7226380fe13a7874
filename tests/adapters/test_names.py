"""Names of tensors with and without what wrappers put before them."""

from fisherkern.adapters.names import bare_name, fit_names


def test_prefixes_are_taken_off_in_any_order():
    for name in ("a.w", "module.a.w", "_orig_mod.module.a.w", "base_model.model.model.a.w"):
        assert bare_name(name) == "a.w"
    assert bare_name("base_model.model.q.lora_A.default.weight") == "q.lora_A.weight"
    assert bare_name("q.default.weight") == "q.default.weight"


def test_names_fit_exactly_or_by_what_is_left():
    assert fit_names(["model.a", "a"], ["model.a", "a"]) == {"model.a": "model.a", "a": "a"}
    assert fit_names(["module.a"], ["torch_model.a", "b"]) == {"module.a": "torch_model.a"}
    adapter = "base_model.model.q.lora_B.weight"
    assert fit_names(["q.lora_B.default.weight"], [adapter]) == {"q.lora_B.default.weight": adapter}
    # Several fit, or none.
    assert fit_names(["module.a", "x"], ["model.a", "torch_model.a"]) == {}
    assert fit_names(["module.a", "model.a"], ["a", "c"]) == {}
