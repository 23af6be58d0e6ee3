"""The canonical ops of compressed attention against the modules of the model that has them, over whole sequences without a cache."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ad_attention.compressed.op import compress, compressed
from ad_attention.match.hf_compressed import CompressedAttentionSeam
from ad_attention.match.hf_masks import MaskDescription
from ad_attention.sparse.op import select
from ad_core.api.errors import CaptureError

modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")

LENGTHS = (1, 3, 4, 11, 24)
HIDDEN, DIM, RATES = 24, 16, {"compressed_sparse_attention": 4, "heavily_compressed_attention": 3}


def config() -> object:
    rope = {"rope_type": "default", "partial_rotary_factor": 0.5}
    return modeling.DeepseekV4Config(
        **{"hidden_size": HIDDEN, "head_dim": DIM, "num_attention_heads": 4, "q_lora_rank": 12, "num_hidden_layers": 1},
        **{"index_n_heads": 6, "index_head_dim": 8, "index_topk": 2, "compress_rates": RATES, "sliding_window": 5},
        rope_parameters={"main": {**rope, "rope_theta": 10000.0}, "compress": {**rope, "rope_theta": 160000.0}},
    )


def made(kind: type[nn.Module]) -> nn.Module:
    """A module with random weights in float64."""
    torch.manual_seed(0)
    module = kind(config()).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


def inputs(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, the queries' latents and positions of two sequences."""
    draw = torch.Generator().manual_seed(length)
    hidden, latent = (torch.randn(2, length, width, generator=draw, dtype=torch.float64) for width in (HIDDEN, 12))
    return hidden, latent, torch.arange(length).expand(2, -1)


def entries(compressor: nn.Module, hidden: torch.Tensor, every: int, overlap: bool) -> torch.Tensor:
    """The op's entries, normed and rotated as the module does it: [B, blocks, D]."""
    x, gate = compressor.kv_proj(hidden), compressor.gate_proj(hidden)
    at_tokens = compress(x, gate, compressor.position_bias, every=every, overlap=overlap)
    rows = compressor.kv_norm(at_tokens[:, every - 1 :: every])
    first = (torch.arange(rows.shape[1]) * every).expand(rows.shape[0], -1)
    cos, sin = compressor.rotary_emb(rows, position_ids=first, layer_type="compress")
    return modeling.apply_rotary_pos_emb(rows.unsqueeze(1), cos, sin).squeeze(1)


@pytest.mark.parametrize("length", LENGTHS)
def test_entries_are_those_of_a_compressor_without_overlap(length):
    compressor = made(modeling.DeepseekV4HCACompressor)
    hidden, latent, positions = inputs(length)
    wanted, _ = compressor(hidden, latent, positions, None, 0)
    torch.testing.assert_close(entries(compressor, hidden, 3, overlap=False), wanted.squeeze(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("length", LENGTHS)
def test_entries_are_those_of_a_compressor_with_overlap(length):
    compressor = made(modeling.DeepseekV4CSACompressor)
    hidden, latent, positions = inputs(length)
    wanted, _ = compressor(hidden, latent, positions, None, 0)
    torch.testing.assert_close(entries(compressor, hidden, 4, overlap=True), wanted.squeeze(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("length", LENGTHS)
def test_blocks_are_those_that_an_indexer_chooses(length):
    indexer = made(modeling.DeepseekV4Indexer)
    hidden, latent, positions = inputs(length)
    wanted = indexer(hidden, latent, positions, None, 0)
    key = torch.full((2, length, 8), torch.nan, dtype=torch.float64)
    key[:, 3::4] = entries(indexer, hidden, 4, overlap=True)
    cos, sin = indexer.rotary_emb(hidden, position_ids=positions, layer_type="compress")
    query = modeling.apply_rotary_pos_emb(indexer.q_b_proj(latent).unflatten(2, (6, 8)), cos, sin, unsqueeze_dim=2)
    weight = indexer.scorer.weights_proj(hidden) * 6**-0.5
    found = select(query.float(), key.float(), weight.float(), count=2, scale=8**-0.5, every=4)
    wanted = nn.functional.pad(wanted, (0, 2 - wanted.shape[2]), value=-1).sort(-1).values
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_attention_is_one_softmax_over_the_window_the_seen_entries_and_the_sinks(length, chosen):
    draw = torch.Generator().manual_seed(length)
    query, key, entry = (torch.randn(1, length, *shape, generator=draw, dtype=torch.float64) for shape in ((2, 6), (6,), (6,)))
    sinks = torch.randn(2, generator=draw, dtype=torch.float64)
    selected = torch.randint(-1, 3, (1, length, 2), generator=draw) if chosen else None
    found = compressed(query, key, entry, selected, sinks, scale=0.4, window=5, every=4)
    for i in range(length):
        seen = [key[0, j] for j in range(max(0, i - 4), i + 1)]
        for block in range((i + 1) // 4):
            if selected is None or block in selected[0, i].tolist():
                seen.append(entry[0, 4 * block + 3])
        rows = torch.stack(seen)
        for head in range(2):
            scores = torch.cat([rows @ query[0, i, head] * 0.4, sinks[head, None]])
            torch.testing.assert_close(found[0, i, head], scores.softmax(0)[:-1] @ rows)


def attention(kind: str) -> nn.Module:
    settings = config()
    settings.layer_types = [kind]
    return modeling.DeepseekV4Attention(settings, 0)


def test_a_seam_reaches_attention_that_has_a_compressor():
    seam = CompressedAttentionSeam()
    assert all(seam.reaches(attention(kind)) for kind in RATES)
    assert not seam.reaches(attention("sliding_attention"))


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (MaskDescription(window=7), "its window is 5 and its mask's 7"),
        (MaskDescription(chunk=5), "chunks of 5"),
        (MaskDescription(problem="it is not causal"), "it is not causal"),
        (None, "not called with a mask"),
    ],
)
def test_a_mask_that_is_not_the_window_is_refused(mask, reason):
    entered: list[str] = []
    forward = CompressedAttentionSeam().forward(attention("compressed_sparse_attention"), entered.append)
    hidden, _, positions = inputs(4)
    with pytest.raises(CaptureError, match=reason):
        forward(hidden, {}, positions, mask)
    assert not entered
