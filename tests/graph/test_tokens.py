"""What mixes tokens is found, and nothing else: planted mixers, clean blocks, and real models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import zip_longest

import pytest
import torch
from torch import nn

from ad_core.api.errors import GraphInvalidError
from ad_core.graph.ops import define_op
from ad_core.graph.tokens import MixingNode, find_mixing
from ad_core.passes.core import clean_passes

from ..exported import ATTENTION, VOCABULARY, apply, attention, cleaned, export, export_model

F = nn.functional
D = 12


class Middle(nn.Module):
    """A function of [B, S, D] -> [B, S, D] as a module, with weights that it may use as `m.w` and so on."""

    def __init__(self, function: Callable[..., torch.Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(D, D))
        self.conv = nn.Parameter(torch.randn(D, 1, 4))
        self.experts = nn.Parameter(torch.randn(4, D, D))
        self.router = nn.Parameter(torch.randn(4, D))
        self.table = nn.Parameter(torch.randn(512, D))
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


class Stack(nn.Module):
    """Embedding, the middles one after the other on a residual stream, head."""

    def __init__(self, middles: Mapping[str, Callable[..., torch.Tensor]]):
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, D), nn.Linear(D, VOCABULARY)
        self.middles = nn.ModuleDict({name.replace(" ", "_"): Middle(function) for name, function in middles.items()})

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        for middle in self.middles.values():
            x = x + middle(x)
        return self.head(x)


def block(middle: Callable[..., torch.Tensor]) -> Stack:
    """A model of one middle."""
    return Stack({"middle": middle})


def mixing(middle: Callable[..., torch.Tensor], claimed: tuple[str, ...] = ()) -> list[MixingNode]:
    return find_mixing(cleaned(export(block(middle))), claimed)


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.view(x.shape[0], x.shape[1], 3, D // 3).transpose(1, 2)


def eager_attention(m, x):
    q, k, v = heads(x), heads(x @ m.w), heads(x)
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    scores = (q @ k.transpose(-1, -2)).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def einsum_attention(m, x):
    scores = torch.einsum("bsd,btd->bst", x, x @ m.w)
    return torch.einsum("bst,btd->bsd", scores.tril(), x)


def causal_conv(m, x):
    return F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), m.conv, groups=D).transpose(1, 2)


def conv_cut(m, x):
    return F.conv1d(x.transpose(1, 2), m.conv, padding=3, groups=D)[..., : x.shape[1]].transpose(1, 2)


def token_shift(m, x):
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


def shift_by_padding(m, x):
    return F.pad(x, (0, 0, 1, -1))


def pooled(m, x):
    return x.mean(1, keepdim=True).expand_as(x)


def normed_over_tokens(m, x):
    return F.layer_norm(x.transpose(1, 2), (x.shape[1],)).transpose(1, 2)


def linear_attention(m, x):
    """Chunk-free linear attention: a cumulative sum of outer products."""
    state = (x[..., :, None] * (x @ m.w)[..., None, :]).cumsum(1)
    return (x[..., None, :] @ state).squeeze(-2)


def last_token(m, x):
    return x[:, -1:].expand_as(x)


def gathered_from_first(m, x):
    index = torch.zeros(x.shape[0], x.shape[1], 1, dtype=torch.int64).expand(-1, -1, D)
    return x.gather(1, index)


def most_wanted_tokens(m, x):
    """Only the tokens with the largest scores pass, as in mixture of depths: which do depends on the others."""
    score = x.sum(-1)
    limit = score.topk(1, dim=1).values
    return x * (score >= limit).unsqueeze(-1)


def capacity_limited_experts(m, x):
    """Experts that drop tokens once they have taken three: whether a token is dropped depends on those before it."""
    choice = F.one_hot((x @ m.router.T).argmax(-1), 4)
    taken = (choice.cumsum(1) * choice).sum(-1)
    return x * (taken <= 3).unsqueeze(-1)


def spectral(m, x):
    return torch.fft.fft(x, dim=1).real


def grouped_norm(m, x):
    return F.group_norm(x.transpose(1, 2), 3).transpose(1, 2)


def position_matrix(m, x):
    """A fixed mixing matrix, as in an MLP-mixer with decay."""
    place = torch.arange(x.shape[1])
    decay = (-(place[:, None] - place[None]).abs().float()).exp()
    return decay @ x


MIXERS = {
    "sdpa": (lambda m, x: F.scaled_dot_product_attention(heads(x), heads(x), heads(x), is_causal=True).transpose(1, 2).flatten(2)),
    "eager attention": eager_attention,
    "einsum attention": einsum_attention,
    "linear attention": linear_attention,
    "causal conv": causal_conv,
    "conv cut to the length": conv_cut,
    "cumsum": lambda m, x: x.cumsum(1),
    "cummax": lambda m, x: x.cummax(1).values,
    "roll": lambda m, x: x.roll(1, 1),
    "flip": lambda m, x: x.flip(1),
    "token shift": token_shift,
    "shift by padding": shift_by_padding,
    "pooling": pooled,
    "norm over tokens": normed_over_tokens,
    "group norm": grouped_norm,
    "last token": last_token,
    "gather": gathered_from_first,
    "most wanted tokens": most_wanted_tokens,
    "capacity-limited experts": capacity_limited_experts,
    "fft": spectral,
    "position matrix": position_matrix,
    "sort": lambda m, x: x.sort(1).values,
    "rows reversed by an index": lambda m, x: x[:, x.shape[1] - 1 - torch.arange(x.shape[1])],
    "flattened across tokens": lambda m, x: x.transpose(1, 2).contiguous().view(x.shape[0], x.shape[1], D),
    "length as a number": lambda m, x: x * x.shape[1],
    "length as a tensor": lambda m, x: x / torch.ones_like(x[0, :, 0]).sum(),
    "own positions": lambda m, x: x + torch.arange(x.shape[1])[:, None],
    "weight cut to the length": lambda m, x: x + m.table[: x.shape[1]],
}


def routed_experts(m, x):
    """Tokens are sorted by expert, computed in groups, and put back: as a whole nothing moves between them."""
    flat = x.flatten(0, 1)
    weights, choice = (flat @ m.router.T).softmax(-1).topk(2)
    order = choice.flatten().argsort()
    rows = flat[order // 2]
    out = torch.bmm(rows[:, None], m.experts[choice.flatten()[order]]).squeeze(1)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0], device=x.device)
    return (out[back].view(flat.shape[0], 2, D) * weights[..., None]).sum(1).view(x.shape)


def scattered_experts(m, x):
    """The same, added up in place instead of put back."""
    flat = x.flatten(0, 1)
    choice = (flat @ m.router.T).argmax(-1)
    order = choice.argsort()
    out = torch.bmm(flat[order][:, None], m.experts[choice[order]]).squeeze(1)
    return torch.zeros_like(flat).index_add(0, order, out).view(x.shape)


def interleaved_rotary(m, x):
    a, b = heads(x).transpose(1, 2).reshape(*x.shape[:2], 6, 2).unbind(-1)
    return torch.stack([-b, a], -1).flatten(2)


def there_and_back(m, x):
    """Dims, splits, repeats and gathers on everything but the tokens."""
    y = x.transpose(1, 2).reshape(x.shape[0], 3, 4, x.shape[1]).permute(0, 3, 2, 1)
    left, right = y.flatten(2).chunk(2, -1)
    z = torch.cat([right, left], -1).roll(1, -1).flip(-1).repeat_interleave(2, -1)[..., ::2]
    picked = z.gather(-1, z.topk(D, -1).indices)
    return F.pad(picked.cumsum(-1), (1, -1)) + m.table[picked.argmax(-1)]


CLEAN = {
    "gated mlp": lambda m, x: F.silu(x @ m.w) * F.linear(x, m.w),
    "rms norm": lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "layer norm": lambda m, x: F.layer_norm(x, (D,)),
    "routed experts": routed_experts,
    "scattered experts": scattered_experts,
    "interleaved rotary": interleaved_rotary,
    "there and back": there_and_back,
    "einsum over features": lambda m, x: torch.einsum("bsd,de->bse", x, m.w),
    "conv with one tap": lambda m, x: F.conv1d(x.transpose(1, 2), m.w[..., None]).transpose(1, 2),
    "group norm of each token": lambda m, x: F.group_norm(x.flatten(0, 1), 3).view_as(x),
    "flat tokens": lambda m, x: F.linear(x.view(-1, D), m.w).view(x.shape),
    "expanded weight": lambda m, x: torch.cat([x, m.w[:1].expand(x.shape[0], x.shape[1], D)], -1)[..., :D],
    "zeros of the length": lambda m, x: torch.cat([torch.zeros(x.shape[0], x.shape[1], 1), x], -1)[..., :D],
    "square root of a size": lambda m, x: x * x.shape[-1] ** -0.5,
    "shift and back": lambda m, x: x.roll(1, 1).roll(-1, 1),
}


@pytest.fixture(scope="module")
def found_in_all() -> dict[str, list[MixingNode]]:
    """What is found in one model of all middles, clean ones and mixers by turns, by middle. One export for all of them."""
    names = [name for pair in zip_longest(CLEAN, MIXERS) for name in pair if name is not None]
    graph = export(Stack({name: (CLEAN | MIXERS)[name] for name in names}))
    apply(graph, [each for each in clean_passes() if each.name not in ("core.positions", "core.duplicates")])
    found: dict[str, list[MixingNode]] = {}
    for entry in find_mixing(graph):
        found.setdefault(entry.module.removeprefix("middles.").replace("_", " "), []).append(entry)
    return found


@pytest.mark.parametrize("name", MIXERS)
def test_a_planted_mixer_is_found(name: str, found_in_all: dict[str, list[MixingNode]]) -> None:
    assert found_in_all.get(name)


@pytest.mark.parametrize("name", CLEAN)
def test_a_block_that_keeps_tokens_apart_is_clean(name: str, found_in_all: dict[str, list[MixingNode]]) -> None:
    assert found_in_all.get(name) is None


def test_nothing_else_is_found(found_in_all: dict[str, list[MixingNode]]) -> None:
    assert found_in_all.keys() == MIXERS.keys()


def test_only_the_mixer_is_named_with_its_reason() -> None:
    (found,) = mixing(lambda m, x: F.silu(x) + causal_conv(m, F.linear(x, m.w)))
    assert found.op == "aten.pad.default"
    assert found.source.startswith("test_tokens.py:")
    assert "pads the tokens" in found.reason


def test_a_mixer_does_not_hide_those_that_follow_it() -> None:
    found = mixing(lambda m, x: causal_conv(m, eager_attention(m, x.cumsum(1))))
    assert [entry.op for entry in found] == ["aten.cumsum.default", "aten.matmul.default", "aten.pad.default"]


def test_two_mixers_that_meet_are_both_found() -> None:
    found = mixing(lambda m, x: x.cumsum(1) * x.flip(1))
    assert {entry.op for entry in found} == {"aten.cumsum.default", "aten.flip.default"}


def test_a_claimed_op_may_mix_and_an_unclaimed_one_may_not() -> None:
    def attend(m, x):
        q = x.view(x.shape[0], x.shape[1], 3, 4)
        return attention(q, q, q, 0.5).flatten(2)

    assert mixing(attend, (ATTENTION,)) == []
    (found,) = mixing(attend)
    assert found.op == "ad_testgraph.attention.default"


def test_a_square_mask_that_a_claimed_op_reads_is_reported() -> None:
    def attend(m, x):
        bias = torch.ones(x.shape[1], x.shape[1]).tril()
        return masked(x, bias)

    masked = define_op(
        "ad_testgraph::masked(Tensor x, Tensor bias) -> Tensor", lambda x, bias: bias @ x, lambda x, bias: torch.empty_like(x)
    )
    (found,) = mixing(attend, ("ad_testgraph::masked",))
    assert "length twice" in found.reason


def test_an_op_of_another_package_is_tried() -> None:
    apart = define_op("ad_testgraph::apart(Tensor x) -> Tensor", lambda x: x.softmax(-1), lambda x: torch.empty_like(x))
    across = define_op("ad_testgraph::across(Tensor x) -> Tensor", lambda x: x + 1e-2 * x.roll(1, 1), lambda x: torch.empty_like(x))
    assert mixing(lambda m, x: apart(x)) == []
    (found,) = mixing(lambda m, x: across(x))
    assert "changes at other tokens" in found.reason


def test_an_op_that_cannot_be_run_counts_as_mixing() -> None:
    def fails(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("needs a GPU")

    broken = define_op("ad_testgraph::broken(Tensor x) -> Tensor", fails, lambda x: torch.empty_like(x))
    (found,) = mixing(lambda m, x: broken(x))
    assert "needs a GPU" in found.reason


def test_an_op_without_finite_numbers_proves_nothing() -> None:
    nothing = define_op("ad_testgraph::nothing(Tensor x) -> Tensor", lambda x: x * float("nan"), lambda x: torch.empty_like(x))
    assert mixing(lambda m, x: nothing(x))


def test_weights_on_meta_are_enough() -> None:
    with torch.device("meta"):
        model = block(lambda m, x: routed_experts(m, x) + x.cumsum(1))
    (found,) = find_mixing(cleaned(export(model)))
    assert found.op == "aten.cumsum.default"


@pytest.mark.parametrize("padding", [1, 7, 100])
@pytest.mark.parametrize("constant", ["number", "tensor"])
def test_tokens_that_are_counted_unless_they_are_a_certain_one_mix(padding: int, constant: str) -> None:
    """Made-up ids would hardly ever be the one that the model compares with. (The last is one that no token can be.)"""

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.places, self.head = nn.Embedding(VOCABULARY, 8), nn.Embedding(64, 8), nn.Linear(8, VOCABULARY)
            self.register_buffer("padding", torch.tensor([padding]))

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            kept = input_ids != (padding if constant == "number" else self.padding)
            return self.head(self.tokens(input_ids) + self.places(kept.int().cumsum(1)))

    graph = export(Counted())
    apply(graph, [each for each in clean_passes() if each.name != "core.padding"])
    assert [entry.op for entry in find_mixing(graph)] == ["aten.cumsum.default"]


def test_a_weight_that_every_token_gets_is_no_position() -> None:
    assert mixing(lambda m, x: m.w[0].expand_as(x).contiguous() + x) == []


def test_half_precision_is_no_false_alarm() -> None:
    model = block(lambda m, x: routed_experts(m, x) + grouped_norm(m, x.flatten(0, 1)[:, None]).view_as(x)).bfloat16()
    assert find_mixing(cleaned(export(model))) == []


def test_a_graph_of_fixed_length_is_refused() -> None:
    program = torch.export.export(block(lambda m, x: x), (torch.zeros(2, 12, dtype=torch.int64),))
    with pytest.raises(GraphInvalidError, match="fixed to 12"):
        find_mixing(program.module())


def test_a_graph_that_writes_in_place_is_refused() -> None:
    def write(m, x):
        buffer = torch.zeros_like(x)
        buffer[..., 2:] = x[..., 2:].cumsum(1)
        return buffer

    with pytest.raises(GraphInvalidError, match="writes to one of its arguments"):
        find_mixing(export(block(write)))
    assert mixing(write)


# -- real models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "opt", "phi", "mixtral"])
def test_a_model_whose_attention_is_claimed_is_clean(kind: str) -> None:
    assert find_mixing(cleaned(export_model(kind)), (ATTENTION,)) == []


@pytest.mark.parametrize(("kind", "way"), [("llama", "sdpa"), ("gemma2", "eager"), ("gpt2", "sdpa"), ("bloom", "eager")])
def test_every_attention_of_a_model_is_found_when_nothing_claims_it(kind: str, way: str) -> None:
    found = find_mixing(cleaned(export_model(kind, way, positions=kind != "bloom")), ())
    assert len(found) == 2  # one a layer
    assert all("attn" in entry.module or "attention" in entry.module for entry in found)
    assert all(entry.source.startswith(f"modeling_{kind}.py:") or entry.source for entry in found)


def test_positions_counted_from_the_ids_are_found_where_padding_means_something() -> None:
    """RoBERTa counts its positions by a cumulative sum over the ids that are not padding."""
    assert find_mixing(cleaned(export_model("camembert", positions=False)), (ATTENTION,)) == []
    graph = export_model("camembert", positions=False)
    apply(graph, [each for each in clean_passes() if each.name != "core.padding"])
    assert [entry.op for entry in find_mixing(graph, (ATTENTION,))] == ["aten.cumsum.default"]
