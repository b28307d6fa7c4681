"""How many channels each layer keeps, given what removing channels costs in each."""

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from optimum_otprune.errors import ConfigurationError


def allocate_widths(removal_costs: Sequence[Tensor], kept_total: int, multiple_of: int = 1) -> list[int]:
    """Share a budget of channels among layers so that the sum of what their removals cost is least.

    Channels go a multiple at a time, each time from the layer where one costs least. A cost below an earlier one of
    the same layer counts as that one: the curves are taken as convex, for which greedy removal is exact.

    Args:
        removal_costs: One tensor `(intermediate_size,)` for each layer: what removing the first, second, … channel
            adds to the loss. Layers may differ in width.
        kept_total: Number of channels that all layers may keep together.
        multiple_of: Every width that is changed becomes a multiple of this number; at least one multiple stays.

    Returns:
        The number of kept channels of each layer; the sum is at most the budget, and less than one multiple below it.

    Raises:
        ConfigurationError: If the budget is less than one multiple a layer.

    Example:
        >>> cheap, dear = torch.tensor([1.0, 1.0, 1.0, 9.0]), torch.tensor([5.0, 6.0, 7.0, 8.0])
        >>> allocate_widths([cheap, dear], kept_total=4)
        [1, 3]
    """
    widths = [len(costs) for costs in removal_costs]
    least = sum(min(multiple_of, width) for width in widths)
    if kept_total < least:
        raise ConfigurationError(
            f"{kept_total} channels are too few for {len(widths)} layers that keep at least {multiple_of} each. Lower "
            "`pruning_ratio` or `multiple_of`."
        )
    totals = [torch.cat([costs.new_zeros(1), costs.cummax(dim=0).values.cumsum(dim=0)]) for costs in removal_costs]
    steps = [_next_step(total, layer, widths[layer], multiple_of) for layer, total in enumerate(totals)]
    queue = [step for step in steps if step is not None]
    heapq.heapify(queue)
    while sum(widths) > kept_total:
        _, layer, width = heapq.heappop(queue)
        widths[layer] = width
        if step := _next_step(totals[layer], layer, width, multiple_of):
            heapq.heappush(queue, step)
    return widths


def _next_step(total: Tensor, layer: int, width: int, multiple_of: int) -> tuple[float, int, int] | None:
    """Return the cost per channel of cutting a layer to the next lower multiple, the layer, and that width."""
    narrower = (width - 1) // multiple_of * multiple_of
    if narrower < multiple_of:
        return None
    full = len(total) - 1
    cost = float(total[full - narrower] - total[full - width]) / (width - narrower)
    return cost, layer, narrower
