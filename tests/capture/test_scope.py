"""Scopes that leave a module as it was, even one that writes to its own weights when it is called."""

from __future__ import annotations

import torch
from torch import nn

from ad_core.capture.scope import tensors_kept, untouched


class Halving(nn.Module):
    """Rescales its weight in place before its first answer, as some language models do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.halved = False

    def forward(self, x):
        if not self.halved:
            self.layer.weight.data[1:].mul_(0.5)
            self.halved = True
        self.calls.add_(1)
        return self.other(self.layer(x))


@torch.no_grad()
def test_what_a_forward_writes_to_weights_and_buffers_is_taken_back():
    module, x = Halving(), torch.randn(2, 4)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with untouched(module), tensors_kept(module):
        first, second = module(x), module(x)
        assert torch.equal(first, second), "in the scope it runs as it likes"
        assert int(module.calls) == 2
    assert module.halved is False
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert torch.equal(module(x), first)


def test_only_what_is_written_to_is_copied():
    module = Halving()
    with tensors_kept(module), torch.no_grad():
        module(torch.randn(2, 4))
        from torch.utils._python_dispatch import _get_current_dispatch_mode

        keeper = _get_current_dispatch_mode()
        assert {id(tensor) for tensor, _ in keeper.kept.values()} == {id(module.layer.weight), id(module.calls)}
