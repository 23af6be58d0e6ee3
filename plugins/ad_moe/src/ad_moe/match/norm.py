"""Whether a norm behind the experts is the op's: by trying it on numbers."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn

from ad_moe.op import post_norm


def same_as_post_norm(norm: nn.Module) -> bool:
    """Whether `norm` scales by 1 + its weight and then divides by the root mean square. Its own numbers may be on meta."""
    weight, eps = getattr(norm, "weight", None), getattr(norm, "eps", None)
    if not isinstance(weight, torch.Tensor) or not isinstance(eps, float):
        return False
    generator = torch.Generator().manual_seed(0)
    trial = deepcopy(norm).to_empty(device="cpu").to(torch.float32)
    with torch.no_grad():
        trial.weight.copy_(torch.randn(weight.shape, generator=generator))  # type: ignore[operator, union-attr]
        x = torch.randn(3, *weight.shape, generator=generator)
        try:
            wanted = trial(x)
        except Exception:  # any code of the author's
            return False
        return torch.allclose(post_norm(x, 1.0 + trial.weight, eps), wanted, rtol=1e-5, atol=1e-6)  # type: ignore[operator, arg-type]
