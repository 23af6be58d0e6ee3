"""Choices in the order of their experts, and one matrix product for each expert that is chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Groups:
    """`order` [N]: places in the flattened choices, sorted by expert, without those that are no expert's. `spans` holds (expert, start,
    stop) in `order` for every expert that occurs."""

    order: torch.Tensor
    spans: list[tuple[int, int, int]]

    @staticmethod
    def of(selected: torch.Tensor, num_experts: int) -> Groups:
        """Of the experts that are chosen, [.., K] integer. Reads them on the host."""
        experts, order = selected.flatten().sort()
        spans: list[tuple[int, int, int]] = []
        ids, start = experts.tolist(), 0
        for place in range(1, len(ids) + 1):  # over choices, as a loop in Python: their products cost thousands of times as much
            if place == len(ids) or ids[place] != ids[start]:
                if 0 <= ids[start] < num_experts:
                    spans.append((ids[start], start, place))
                start = place
        first, last = (spans[0][1], spans[-1][2]) if spans else (0, 0)
        return Groups(order[first:last], [(expert, start - first, stop - first) for expert, start, stop in spans])

    def rows(self, choices: int) -> torch.Tensor:
        """[N]: the token of each choice."""
        return self.order if choices == 1 else self.order // choices

    def product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool) -> torch.Tensor:
        """Rows [N, In] in the groups' order, each times its expert's weight, [E, Out, In] or transposed [E, In, Out] -> [N, Out]."""
        out = x.new_empty(x.shape[0], weight.shape[2 if transposed else 1])
        for expert, start, stop in self.spans:
            one = weight[expert] if transposed else weight[expert].t()
            if bias is None:
                torch.mm(x[start:stop], one, out=out[start:stop])
            else:
                torch.addmm(bias[expert], x[start:stop], one, out=out[start:stop])
        return out
