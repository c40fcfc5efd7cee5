"""Tests of muon.py: what torch.optim.Muon does, for all matrices of one shape at once."""
import copy

import pytest
import torch
from torch.testing import assert_close

from assets.muon import Muon, orthogonalize

SHAPES = [(6, 6), (6, 6), (12, 5), (5, 12), (5, 12)]


# in bfloat16 to the bit; in float32 as far as bfloat16's rounding goes
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-7), (torch.float32, 5e-3)])
def test_steps_are_those_of_torchs_optimizer(dtype, tolerance):
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in SHAPES]
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    optimizers = [
        Muon(ours, 0.1, 0.2, dtype),
        torch.optim.Muon(theirs, 0.1, 0.2, adjust_lr_fn="match_rms_adamw")]
    for step in range(4):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        # one matrix without a gradient is left alone
        ours[step].grad = theirs[step].grad = None
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
            optimizer.step()
    for a, b, x in zip(ours, theirs, start):
        assert (a - x).abs().max() > 0.1
        assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 4, 9), (2, 9, 4)])
def test_orthogonalized_matrices_have_singular_values_near_one_and_the_same_directions(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    y = orthogonalize(x, torch.float32)
    assert y.shape == x.shape
    values = torch.linalg.svdvals(y)
    assert 0.3 < values.min() and values.max() < 1.3
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    between = u.mT @ y @ v.mT
    diagonal = torch.diag_embed(between.diagonal(dim1=1, dim2=2))
    assert_close(between, diagonal, atol=1e-4, rtol=0)


def test_a_resumed_optimizer_goes_on_with_its_momentum():
    torch.manual_seed(0)
    p, q = (torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    first, second = Muon([p], 0.1, 0.0, torch.float32), Muon([q], 0.1, 0.0, torch.float32)
    p.grad = torch.randn(4, 3)
    first.step()
    q.data.copy_(p.data)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for x, optimizer in ((p, first), (q, second)):
        x.grad = torch.ones(4, 3)
        optimizer.step()
    assert torch.equal(p, q)
