"""The Muon optimizer, for all matrices of one shape at once and in the machine's own precision.

    optimizer = Muon(matrices, lr=1e-3, weight_decay=0.01, dtype=torch.float32)

torch.optim.Muon(adjust_lr_fn="match_rms_adamw") does the same, matrix by matrix and always in
bfloat16: where the processor has no instructions for it, that takes longer than the model itself.
Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; the rates of Liu et al.
2025, arXiv:2502.16982.
"""
from collections import defaultdict

import torch


def orthogonalize(x, dtype, steps=5):
    """x (n, rows, columns) -> U V^T of each matrix's SVD, roughly: its singular values near 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = x.shape[1] > x.shape[2]
    # the smaller product of a matrix with itself
    x = (x.mT if is_tall else x).to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    # Newton-Schulz: a x + b (x x^T) x + c (x x^T)^2 x
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Momentum (Nesterov's), orthogonalized; decoupled weight decay.

    Steps are as large as AdamW's, so that its rates fit. dtype: of the orthogonalization.
    """

    def __init__(self, matrices, lr, weight_decay, dtype, momentum=0.95):
        super().__init__(matrices, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
                    self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            for shape, matrices in by_shape.items():
                grads = [p.grad for p in matrices]
                buffers = [self.state[p]["momentum_buffer"] for p in matrices]
                torch._foreach_lerp_(buffers, grads, 1 - momentum)
                update = torch.stack(torch._foreach_lerp(grads, buffers, momentum))
                update = orthogonalize(update, self.dtype).to(update.dtype)
                torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
                step = lr * 0.2 * max(shape) ** 0.5
                torch._foreach_add_(matrices, list(update.unbind()), alpha=-step)
