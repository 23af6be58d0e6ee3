"""What the insertion of caches writes to the layout."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule

from ad_core.api import Kernel, Limits, Mixer, PagedTokens, PassContext, Role, SlotState
from ad_core.cache.insert import InsertCaches, Served
from ad_core.graph.ops import define_op
from ad_core.plan import Plan

MIX = define_op("insert_test::mix(Tensor x) -> Tensor", lambda x: x.clone(), torch.empty_like)
define_op(
    "insert_test::mix_cached(Tensor x, Tensor(a!) kept, Tensor(b!) state, Tensor token_slots) -> Tensor",
    lambda x, *_: x.clone(),
    lambda x, *_: torch.empty_like(x),
)


class Cached(Kernel):
    name, target, op = "insert_test.mix", "insert_test::mix", "insert_test::mix_cached"


class Both(Mixer):
    """Keeps something a token and something a sequence."""

    name, op, roles, kernels = "insert_test.both", MIX, {"x": Role.TOKEN}, (Cached(),)

    def resources(self, call, options):
        return {"kept": PagedTokens((3,), torch.float32), "state": SlotState((5,), torch.float32)}


def test_a_mixer_may_keep_pages_and_a_slot():
    graph = Graph()
    ids = graph.placeholder("input_ids")
    mixed = graph.call_function(MIX, (ids,))
    graph.output(mixed)
    with FakeTensorMode():
        ids.meta["val"] = mixed.meta["val"] = torch.empty(1, 8, dtype=torch.int64)
    insertion = InsertCaches([Served(Both(), {})], lambda call: Cached(), Limits(8, 2, 64, 16), Plan())
    insertion.run(GraphModule({}, graph), PassContext(torch.device("cpu"), None, {}))
    assert {type(pool.resource): pool.group for pool in insertion.layout.pools} == {PagedTokens: 0, SlotState: -1}
    spec = insertion.layout.spec()
    assert (spec.groups[0].page_bytes, spec.slot_bytes) == (16 * 12, 20)
