"""Rows of uneven length through Unsloth's attention, one by one and in one call."""

from unittest import mock

from accelerate_unsloth.engines import select  # noqa: F401

# isort: split
import torch
from unsloth.utils import attention_dispatch as dispatch
from unsloth.utils.packing import get_packed_info_from_kwargs

from accelerate_unsloth.engines import kernels
from accelerate_unsloth.policies import attention

LENGTHS, HEADS, KV_HEADS, SIZE = [5, 300, 64, 64, 1, 130], 8, 2, 64


def run(backend: str, sliding_window) -> list[torch.Tensor]:
    """Output and gradients of queries, keys and values."""
    torch.manual_seed(0)
    total = sum(LENGTHS)
    rows = [torch.randn(1, heads, total, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    rows = [row.to("cuda", torch.bfloat16).requires_grad_() for row in rows]
    kwargs = {"packed_seq_lengths": torch.tensor(LENGTHS, dtype=torch.int32)}
    context = dispatch.AttentionContext(
        bsz=1,
        q_len=total,
        kv_seq_len=total,
        n_heads=HEADS,
        head_dim=SIZE,
        requires_grad=True,
        seq_info=get_packed_info_from_kwargs(kwargs, torch.device("cuda")),
        attention_mask=None,
        causal_mask=None,
        sliding_window=sliding_window,
    )
    config = dispatch.AttentionConfig(backend=dispatch.SDPA, n_kv_heads=KV_HEADS, n_groups=HEADS // KV_HEADS)
    with attention.applied(attention.AttentionChoice(backend, "")):
        out = dispatch.run_attention(config=config, context=context, Q=rows[0], K=rows[1], V=rows[2])
    out.backward(torch.ones_like(out) * torch.linspace(-1, 1, SIZE, device="cuda", dtype=out.dtype))
    return [out.detach(), *(row.grad for row in rows)]


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).norm() / one.float().norm())


def compare(case):
    """Relative differences of output and gradients between both ways, and how often PyTorch's kernel was called."""
    calls, spare = [], kernels.spare_varlen()
    if spare is None:
        return {"spare": False}

    def counted(*rows, **options):
        calls.append(1)
        return spare(*rows, **options)

    found = {"spare": True}
    with mock.patch.object(kernels, "spare_varlen", lambda: counted):
        for window in (None, 40):
            one_by_one = run("flash", window)
            before = len(calls)
            together = run("varlen", window)
            names = ("output", "queries", "keys", "values")
            found[f"window {window}"] = {
                "calls": len(calls) - before,
                **{n: difference(a, b) for n, a, b in zip(names, one_by_one, together, strict=True)},
            }
    return found | {"restored": dispatch._TORCH_VARLEN_ATTN is None}
