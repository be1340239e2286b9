# SPDX-License-Identifier: Apache-2.0
"""msProbe's `risk_level`: which APIs matter for precision.

Source: classes as documented for msProbe 26.2; an API that is in neither set is of
the middle class. `linear` is of class CORE here; msProbe's own set lacks it. What has
the name of a collective operation is of class CORE whatever its prefix.
"""

CORE = frozenset(
    """
    _fused_adamw_ _fused_adam_ matmul __matmul__ bmm addmm addmm_ addbmm addbmm_
    baddbmm baddbmm_ mm mv addmv addmv_ addr addr_ conv1d conv2d conv3d
    conv_transpose1d conv_transpose2d conv_transpose3d conv_tbc convolution
    _convolution bilinear linear chain_matmul batch_norm instance_norm layer_norm
    group_norm local_response_norm _batch_norm_impl_index batch_norm_elemt
    batch_norm_stats batch_norm_update_stats batch_norm_gather_stats
    batch_norm_gather_stats_with_counts batch_norm_backward_elemt
    batch_norm_backward_reduce multi_dot vecdot embedding embedding_bag
    multi_head_attention_forward scaled_dot_product_attention
    gather scatter
    """.split()
)

LOW = frozenset(
    """
    squeeze unsqueeze reshape reshape_as view view_as flatten unflatten expand
    expand_as repeat repeat_interleave tile transpose permute moveaxis movedim
    swapaxes swapdims chunk unsafe_chunk split split_with_sizes unsafe_split
    unsafe_split_with_sizes tensor_split hsplit vsplit dsplit unbind stack cat concat
    concatenate hstack vstack dstack column_stack row_stack align_as align_to
    atleast_1d atleast_2d atleast_3d ravel clamp unfold type_as to float double int
    long half bfloat16 byte char bool cfloat numpy empty empty_like zeros zeros_like
    ones ones_like full full_like arange linspace logspace eye identity diag diagflat
    diag_embed triu tril triu_indices tril_indices clone __bool__ stride
    """.split()
)


def is_recorded(api: str, prefix: str, risk_level: str) -> bool:
    """Whether an API's calls are recorded at a risk level.

    Args:
        api: Last component of its name.
        prefix: Its prefix; everything distributed is of class CORE.
        risk_level: ALL, FOCUS or CORE.
    """
    if risk_level == "ALL":
        return True
    if risk_level == "CORE":
        return api in CORE or prefix == "Distributed"
    return api not in LOW
