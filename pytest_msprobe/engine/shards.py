# SPDX-License-Identifier: Apache-2.0
"""Places of the tensors of vLLM's tensor-parallel layers.

Read from the layers' attributes, which are the same in all versions from 0.11 on; a
layer that lacks one is left out, and its rows then have no place.
"""

from typing import Any

from pytest_msprobe.model.shards import WHOLE_ON_ALL, Places, Shard, even_runs


def places_of(model: Any) -> dict[str, Places]:
    """Places by module path and slot; empty without tensor parallelism.

    Args:
        model: A `torch.nn.Module` of vLLM.
    """
    found: dict[str, Places] = {}
    for path, module in model.named_modules():
        if int(getattr(module, "tp_size", 1) or 1) < 2:  # noqa: PLR2004 - one rank
            continue
        try:
            places = _places(module)
        except AttributeError:
            continue
        if places:
            found[path] = places
    return found


def _places(module: Any) -> Places:
    kinds = {base.__name__ for base in type(module).__mro__}
    rank, ranks = int(module.tp_rank), int(module.tp_size)
    if "QKVParallelLinear" in kinds:
        return {"input_args.0": WHOLE_ON_ALL, "output.0": _heads(module, rank, ranks)}
    if "ColumnParallelLinear" in kinds:
        if module.gather_output:
            return {"input_args.0": WHOLE_ON_ALL, "output.0": WHOLE_ON_ALL}
        sizes = [int(size) for size in getattr(module, "output_sizes", ())]
        sizes = sizes or [int(module.output_size)]
        shard = Shard(sum(sizes), even_runs(sizes, rank, ranks))
        return {"input_args.0": WHOLE_ON_ALL, "output.0": shard}
    if "RowParallelLinear" in kinds:
        size = int(module.input_size)
        places = {"input_args.0": Shard(size, even_runs([size], rank, ranks))}
        if not module.input_is_parallel:
            places["input_args.0"] = WHOLE_ON_ALL
        if module.reduce_results:
            places["output.0"] = WHOLE_ON_ALL
        return places
    if "VocabParallelEmbedding" in kinds:
        return {"input_args.0": WHOLE_ON_ALL, "output.0": WHOLE_ON_ALL}
    return {}


def _heads(module: Any, rank: int, ranks: int) -> Shard:
    """Queries, keys and values of a rank; key and value heads may be copies."""
    size = int(module.head_size)
    value_size = int(getattr(module, "v_head_size", size))
    queries = int(module.total_num_heads) * size
    copies = int(module.num_kv_head_replicas)
    heads = int(module.total_num_kv_heads)
    local = queries // ranks
    runs = [(0, local, rank * local)]
    skipped = []
    start = queries
    for width in (size, value_size):
        length = int(module.num_kv_heads) * width
        first = (rank // copies) * length
        if rank % copies == 0:
            runs.append((local, length, start + first))
        else:
            skipped.append((local, length))
        local += length
        start += heads * width
    return Shard(start, tuple(runs), tuple(skipped))
