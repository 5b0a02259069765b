"""How PyTorch uses a CPU."""

import torch


def allow_fast_products() -> None:
    """Let oneDNN do float32 matrix products, in this process, where it does them as exactly as MKL.

    MKL, PyTorch's default, keeps off AVX-512 on AMD's processors and takes twice the time there. oneDNN is asked only
    if it may round to bfloat16. Without AMX it then still computes in float32; a CPU on which it does round keeps MKL.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    if not torch.backends.mkldnn.is_available():
        return
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    # 1 + 2^-12 is lost in bfloat16
    value = torch.full((64, 64), 1 + 2.0**-12)
    if not torch.equal(value @ torch.eye(64), value):
        matmul.fp32_precision = before
