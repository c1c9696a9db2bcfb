# ruff: noqa: F821
"""raise_rope: halves, neighbours, wide and narrow tables, both layouts, dims that pass through."""

import torch

from aios_compile.passes.raise_rope import raise_rope
from tests.passes.helpers import apply, captured, check, evaluate, hugging_face, targets


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def rotate_pairs(x):
    return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)


def test_halves_in_both_layouts():
    def f(
        x: "f32[T, 4, 8]",
        y: "f32[1, 4, T, 8]",
        z: "f32[1, T, 4, 8]",
        c: "f32[T, 8]",
        s: "f32[T, 8]",
    ):
        cos, sin = c[None], s[None]
        return (
            x * c.unsqueeze(-2) + rotate_half(x) * s.unsqueeze(-2),
            y * cos.unsqueeze(1) + rotate_half(y) * sin.unsqueeze(1),
            sin.unsqueeze(2) * rotate_half(z) + cos.unsqueeze(2) * z,
        )

    module = check(raise_rope, f, 3)
    assert targets(module).count("aios.rope") == 3 and "cat" not in targets(module)
    assert targets(module).count("permute") == 2


def test_one_head_without_a_dimension():
    def f(x: "f32[T, 8]", c: "f32[T, 8]", s: "f32[T, 8]"):
        return x * c + rotate_half(x) * s

    assert targets(check(raise_rope, f, 1)) == ["unsqueeze", "aios.rope", "squeeze"]


def test_tables_of_half_the_width():
    def f(x: "f32[T, 4, 8]", c: "f32[T, 4]", s: "f32[T, 4]"):
        cos, sin = c[:, None], s[:, None]
        a, b = x.chunk(2, -1)
        y = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        a, b = x[..., :4], x[..., 4:]
        return y, torch.cat((a * cos - b * sin, sin * a + cos * b), -1)

    module = check(raise_rope, f, 2)
    assert targets(module).count("aios.rope") == 2 and "sub" not in targets(module)


def test_neighbours_with_wide_and_narrow_tables():
    def f(x: "f32[T, 4, 8]", c: "f32[T, 8]", s: "f32[T, 8]", h: "f32[T, 4]", g: "f32[T, 4]"):
        wide = x * c[:, None] + rotate_pairs(x) * s[:, None]
        a, b, cos, sin = x[..., 0::2], x[..., 1::2], h[:, None], g[:, None]
        narrow = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        p = x.reshape(*x.shape[:-1], 4, 2)
        a, b = p[..., 0], p[..., 1]
        third = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(2)
        return wide, narrow, third

    module = check(raise_rope, f, 3)
    ropes = [n for n in module.root.graph.nodes if "rope" in str(n.target)]
    assert len(ropes) == 3 and all(n.args[3] is True for n in ropes)


def test_dims_that_pass_through():
    def f(x: "f32[T, 4, 16]", y: "f32[1, 4, T, 16]", c: "f32[T, 8]", s: "f32[T, 8]"):
        head, tail = x[..., :8], x[..., 8:]
        wide = torch.cat((head * c[:, None] + rotate_half(head) * s[:, None], tail), -1)
        a, b, rest = y.split((4, 4, 8), -1)
        cos, sin = c[:, :4], s[:, :4]
        return wide, torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)

    module = check(raise_rope, f, 2)
    assert [
        n.meta["val"].shape[-1] for n in module.root.graph.nodes if "rope" in str(n.target)
    ] == [
        16,
        16,
    ]


def test_wider_tables_than_activations():
    def f(x: "bf16[T, 4, 8]", c: "f32[T, 8]", s: "f32[T, 8]"):
        return x * c[:, None] + rotate_half(x) * s[:, None]

    module = check(raise_rope, f, 1)
    assert module.root.graph.output_node().args[0][0].meta["val"].dtype == torch.float32


def test_near_miss_the_wrong_half_is_negated():
    def f(x: "f32[T, 4, 8]", c: "f32[T, 8]", s: "f32[T, 8]"):
        turned = torch.cat((x[..., 4:], -x[..., :4]), -1)
        return x * c[:, None] + turned * s[:, None]

    check(raise_rope, f, 0)


def test_near_miss_unequal_halves():
    def f(x: "f32[T, 4, 8]", c: "f32[T, 8]", s: "f32[T, 8]"):
        turned = torch.cat((-x[..., 3:], x[..., :3]), -1)
        return x * c[:, None] + turned * s[:, None]

    check(raise_rope, f, 0)


def test_near_miss_another_value_is_turned():
    def f(x: "f32[T, 4, 8]", y: "f32[T, 4, 8]", c: "f32[T, 8]", s: "f32[T, 8]"):
        return x * c[:, None] + rotate_half(y) * s[:, None]

    check(raise_rope, f, 0)


def test_near_miss_tables_of_each_head():
    def f(x: "f32[T, 4, 8]", c: "f32[T, 4, 8]", s: "f32[T, 4, 8]"):
        return x * c + rotate_half(x) * s

    check(raise_rope, f, 0, reason="do not depend on the token alone")


def test_near_miss_tables_with_more_dimensions():
    def f(x: "f32[T, 4, 8]", c: "f32[1, T, 1, 8]", s: "f32[1, T, 1, 8]"):
        return x * c + rotate_half(x) * s

    check(raise_rope, f, 0, reason="more dimensions")


def test_near_miss_the_rest_is_of_another_value():
    def f(x: "f32[T, 4, 16]", y: "f32[T, 4, 16]", c: "f32[T, 8]", s: "f32[T, 8]"):
        head, tail = x[..., :8], y[..., 8:]
        return torch.cat((head * c[:, None] + rotate_half(head) * s[:, None], tail), -1)

    assert "cat" in targets(check(raise_rope, f, 1))


def test_near_miss_complex_numbers():
    def f(x: "f32[T, 4, 8]", f: "f32[T, 1, 4, 2]"):
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], 4, 2))
        return torch.view_as_real(pairs * torch.view_as_complex(f)).flatten(2)

    check(raise_rope, f, 0, reason="complex")


def test_captured_layer_has_two():
    for changes in ({}, {"partial_rotary_factor": 0.5}):
        module = captured("llama", **changes)
        before = evaluate(module)
        assert apply(raise_rope, module).hits == {"layer": 2, "": 0}
        assert torch.allclose(before[0], evaluate(module)[0], atol=1e-9)
        assert apply(raise_rope, module).total == 0
        assert "cat" not in targets(module, "layer")


def test_captured_hugging_face_layers():
    for stem in ("Llama", "Phi", "GPTNeoX"):
        module = hugging_face(stem)
        before = evaluate(module)
        assert apply(raise_rope, module).hits["layer"] == 2
        assert torch.allclose(before[0], evaluate(module)[0], atol=1e-9)
        assert "cat" not in targets(module, "layer")
