"""Choices in the order of their experts, and one matrix product for each expert that is chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Groups:
    """`experts` that occur, in the order of their choices, and how many choices each has in a row (`sizes`).

    `order` [N]: places of these choices in the flattened ones, or None if that is every choice as it stands, as for one token.
    """

    experts: list[int]
    sizes: list[int]
    order: torch.Tensor | None

    @staticmethod
    def of(selected: torch.Tensor, num_experts: int) -> Groups:
        """Of the experts that are chosen, [.., K] integer. Reads them on the host. Choices that are no expert's are left out."""
        if selected.numel() == selected.shape[-1]:
            chosen: list[int] = selected.flatten().tolist()
            if all(0 <= expert < num_experts for expert in chosen):
                return Groups(chosen, [1] * len(chosen), None)
        sorted_ids, order = selected.flatten().sort()
        ids, experts, sizes, skipped = sorted_ids.tolist(), [], [], 0
        start = 0
        for place in range(1, len(ids) + 1):  # over choices, as a loop in Python: their products cost thousands of times as much
            if place == len(ids) or ids[place] != ids[start]:
                if 0 <= ids[start] < num_experts:
                    experts.append(ids[start])
                    sizes.append(place - start)
                elif ids[start] < 0:
                    skipped = place
                start = place
        return Groups(experts, sizes, order[skipped : skipped + sum(sizes)])

    def pick(self, values: torch.Tensor) -> torch.Tensor:
        """[N, ...] of what every choice has, [choices, ...]."""
        return values if self.order is None else values[self.order]

    def rows(self, choices: int) -> torch.Tensor | None:
        """[N]: the token of each choice. None for one token."""
        return None if self.order is None else self.order // choices

    def product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Rows [N, In] in the groups' order, each times its expert's weight, [E, Out, In] of any strides -> [N, Out]."""
        if not self.experts:
            return x.new_empty(0, weight.shape[1])
        parts = zip(self.experts, x.split(self.sizes), strict=True)
        return torch.cat([F.linear(part, weight[expert], None if bias is None else bias[expert]) for expert, part in parts])
