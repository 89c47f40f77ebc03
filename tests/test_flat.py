"""Compare FlatModel with ordinary modules: autograd's gradients, torch.optim on separate tensors, storage addresses."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp

from fastmerge.flat import ALIGN, TAIL, FlatModel


class Odd(nn.Module):
    """A module with all tensors that break naive flattening: tied, frozen, 0-d, empty, buffers, odd sizes, bf16."""

    def __init__(self):
        super().__init__()
        self.second = nn.Linear(7, 5)
        self.first = nn.Linear(5, 7)
        self.tied = self.first
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.low = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.norm = nn.BatchNorm1d(5)
        self.register_buffer("position_ids", torch.arange(4))

    def forward(self, x):
        y = self.second(torch.tanh(self.tied(torch.tanh(self.first(x)[:, :5]))))
        return (self.norm(y) * self.scale).sum(1) + self.low.float().sum() + self.frozen.sum() + self.empty.sum()


@pytest.fixture
def pair():
    torch.manual_seed(0)
    plain = Odd().eval()  # torch.func refuses in-place updates of batch statistics
    plain.low = nn.Parameter(plain.low.data.float())
    return plain, FlatModel(copy.deepcopy(plain))


def gradients(module):
    return {n: p.grad for n, p in module.named_parameters() if p.requires_grad}


def test_layout():
    flat = FlatModel(Odd())
    assert flat.names == sorted(flat.names) and "tied.weight" not in flat.names and "frozen" not in flat.names
    assert all(o % ALIGN == 0 for o in flat.offsets) and flat.numel % TAIL == 0
    assert flat.theta.dtype == torch.float32 and flat.module.low.dtype == torch.float32
    assert flat.module.scale.shape == () and flat.module.empty.shape == (0, 3)
    assert flat.module.tied is flat.module.first
    flat.check_views()


def test_order_of_the_module_does_not_matter():
    a, b = nn.Module(), nn.Module()
    for module, order in ((a, "xyz"), (b, "zxy")):
        for name in order:
            setattr(module, name, nn.Parameter(torch.full((3,), float(ord(name)))))
    assert torch.equal(FlatModel(a).theta, FlatModel(b).theta)


def test_backward_fills_the_flat_gradient(pair):
    plain, flat = pair
    x = torch.randn(6, 5)
    plain(x).sum().backward()
    flat.module(x).sum().backward()
    for name, g in gradients(plain).items():
        torch.testing.assert_close(gradients(flat.module)[name], g, rtol=0, atol=0)
    flat.check_views()
    padding = torch.ones(flat.numel, dtype=torch.bool)
    for view in flat.views(padding):
        view.fill_(False)
    assert padding.any() and not flat.gradient[padding].any() and not flat.theta[padding].any()


def test_optimiser_on_the_buffer_equals_optimiser_on_tensors(pair):
    plain, flat = pair
    separate = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    fused = torch.optim.AdamW([flat.theta], lr=0.1, weight_decay=0.1, fused=True)
    for _ in range(5):
        x = torch.randn(6, 5)
        separate.zero_grad()
        flat.zero_grad()
        plain(x).square().sum().backward()
        flat.module(x).square().sum().backward()
        separate.step()
        fused.step()
    for (name, a), b in zip(flat.module.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    flat.check_views()


def test_as_dict_gradient_equals_autograd(pair):
    plain, flat = pair
    x = torch.randn(6, 5)
    plain(x).square().sum().backward()
    g = grad(lambda theta: functional_call(flat.module, flat.as_dict(theta), x).square().sum())(flat.theta.detach())
    for view, name in zip(flat.views(g), flat.names, strict=True):
        torch.testing.assert_close(view, gradients(plain)[name])
    assert g.count_nonzero() <= sum(flat.sizes)  # padding has no gradient


def test_as_dict_forward_over_reverse():
    """jvp of grad over the flat buffer equals torch.func.hessian times the vector."""
    torch.manual_seed(0)
    flat = FlatModel(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double(), dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64)

    def loss(theta):
        return functional_call(flat.module, flat.as_dict(theta), x).square().mean()

    v = torch.randn_like(flat.theta)
    _, product = jvp(grad(loss), (flat.theta.detach(),), (v,))
    torch.testing.assert_close(product, torch.func.hessian(loss)(flat.theta.detach()) @ v)


def test_round_trip_is_exact_and_does_not_alias(pair):
    plain, flat = pair
    saved = flat.state_dict()
    assert set(saved) == {n for n, p in plain.named_parameters() if p.requires_grad}
    assert len({t.untyped_storage().data_ptr() for t in saved.values() if t.numel()}) == sum(
        t.numel() > 0 for t in saved.values()
    )
    before = flat.theta.detach().clone()
    flat.theta.data.normal_()
    flat.load_state_dict(saved)
    for view, original in zip(flat.views(flat.theta), flat.views(before), strict=True):
        assert torch.equal(view, original)
    flat.module.load_state_dict(plain.state_dict())  # torch's in-place loading also keeps the views
    flat.check_views()


def test_load_state_dict_refuses_without_writing(pair):
    _, flat = pair
    good = flat.state_dict()
    before = flat.theta.detach().clone()
    with pytest.raises(KeyError, match="scale"):
        flat.load_state_dict({n: t + 1 for n, t in good.items() if n != "scale"})
    with pytest.raises(ValueError, match="second.weight"):
        flat.load_state_dict({n: (t[:1] if n == "second.weight" else t + 1) for n, t in good.items()})
    assert torch.equal(flat.theta, before)


def test_moving(pair):
    _, flat = pair
    before = flat.theta.detach().clone()
    flat.to("cpu")
    flat.check_views()
    assert torch.equal(flat.theta, before)


def test_a_broken_view_is_noticed(pair):
    _, flat = pair
    flat.module.zero_grad(set_to_none=True)
    with pytest.raises(RuntimeError, match="zero_grad"):
        flat.check_views()
    flat = FlatModel(Odd())
    flat.module.to(torch.float64)
    with pytest.raises(RuntimeError, match="FlatModel.to"):
        flat.check_views()


def test_torch_compile_keeps_the_views(pair):
    plain, flat = pair
    compiled = torch.compile(flat.module, backend="aot_eager")
    optimiser = torch.optim.SGD([flat.theta], lr=0.1)
    reference = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # the second step must see the weights that the first one wrote
        x = torch.randn(6, 5)
        flat.zero_grad()
        reference.zero_grad()
        compiled(x).square().sum().backward()
        plain(x).square().sum().backward()
        optimiser.step()
        reference.step()
    flat.check_views()
    for (name, a), b in zip(flat.module.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_nothing_to_train():
    with pytest.raises(ValueError, match="nothing to train"):
        FlatModel(nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.gpu
def test_cuda_round_trip():
    flat = FlatModel(Odd())
    before = flat.theta.detach().clone()
    flat.to("cuda")
    flat.check_views()
    flat.module(torch.randn(6, 5, device="cuda")).sum().backward()
    flat.check_views()
    assert torch.equal(flat.to("cpu").theta, before)
