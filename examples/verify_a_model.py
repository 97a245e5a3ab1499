"""Is the compiled model as good as the eager one? Errors of both against float64, outputs and every gradient.

python examples/verify_a_model.py
"""

import torch
from torch import nn

import attnfuse


def main() -> None:
    torch.manual_seed(0)
    # need_weights=False and eval() would take another path; as it stands MultiheadAttention spells its attention out
    layer = nn.TransformerEncoderLayer(d_model=64, nhead=4, dim_feedforward=128, dropout=0.0, batch_first=True)
    x = torch.randn(2, 48, 64)
    padding = torch.zeros(2, 48, dtype=torch.bool)
    padding[1, 40:] = True

    # with 'aot_eager' the rewriting alone is judged; Inductor sums layer norm gradients in an order of its own
    verification = attnfuse.verify(layer, x, src_key_padding_mask=padding, options={"inner": "aot_eager"})
    print(verification)
    print(verification.report)
    verification.raise_if_failed()


if __name__ == "__main__":
    main()
