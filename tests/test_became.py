"""Compare BECAME with plain loops: AdamW per tensor, projectors in float64, a Fisher by autograd image after image."""

import pytest
import torch
import torch.nn.functional as F
import toy
from test_method_inflora import whole_space
from torch.func import functional_call

from fastmerge.loop import kept_bytes
from fastmerge.methods.became import BECAME, free_part
from fastmerge.methods.dual_gpm import grown
from fastmerge.training import learning_rate, positions

FLAGS = ("--clip=0", "--became.threshold=0.9", "--fisher.labels=data", "--weight-decay=0.1")
LAYERS = {"inner": "inner.weight", "attn.qkv": "attn.qkv.weight", "outer": "outer.weight"}


class Plain:
    """Tensors by name, the sum of Fishers, and for every linear layer an orthonormal basis of the old inputs, float64."""

    def __init__(self, learner):
        self.learner, self.module = learner, learner.backbone
        self.weights = {n: p.detach().clone() for n, p in self.module.named_parameters() if n != "fixed"}
        self.precision = {n: torch.zeros_like(w, dtype=torch.float64) for n, w in self.weights.items()}
        self.bases = {}

    def loss(self, weights, x, labels, classes):
        return F.cross_entropy(self.learner.head(functional_call(self.module, weights, (x,)), classes), labels)

    def stage(self, task, images, batches, numbers, projected):
        learner, weights = self.learner, {n: w.clone().requires_grad_() for n, w in self.weights.items()}
        classes = torch.tensor(task.classes)
        optimiser = torch.optim.AdamW(weights.values(), weight_decay=0.1)
        for place, i in enumerate(numbers):
            pixels, labels = images.batch(batches.rows(i))
            x = learner.augmented(pixels, learner.generator("augment", task.index, i))
            before = {n: w.detach().clone() for n, w in weights.items()}
            optimiser.zero_grad()
            self.loss(weights, x, positions(labels, classes), classes).backward()
            optimiser.param_groups[0]["lr"] = learning_rate(1e-2, place, len(numbers))
            optimiser.step()
            for name, w in weights.items() if projected else ():
                change, basis = (w.detach() - before[name]).double(), self.bases.get(name)
                free = torch.zeros_like(change) if basis is None else change - change @ basis @ basis.T
                w.data.copy_(before[name] + free)
        return {n: w.detach() for n, w in weights.items()}

    def fisher(self, task, images):
        classes, total = torch.tensor(task.classes), dict.fromkeys(self.weights, 0.0)
        pixels, labels = images.batch(torch.arange(len(images)))
        x, targets = self.learner.plain(pixels).double(), positions(labels, classes)
        weights = {n: w.double().requires_grad_() for n, w in self.weights.items()}
        for one, target in zip(x, targets, strict=True):
            self.learner.head.double()
            loss = self.loss(weights | {"fixed": self.module.fixed.double()}, one[None], target[None], classes)
            for (n, _), g in zip(weights.items(), torch.autograd.grad(loss, list(weights.values())), strict=True):
                total[n] = total[n] + g.square() / len(x)
            self.learner.head.float()
        return total

    def remember(self, images, threshold):
        seen, hooks = {}, []
        for layer, name in LAYERS.items():
            module = self.module.get_submodule(layer)
            hooks.append(module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: args[0]})))
        with torch.no_grad():
            functional_call(self.module, self.weights, (self.learner.plain(images.images),))
        for hook in hooks:
            hook.remove()
        for name, x in seen.items():
            x, old = x.double(), self.bases.get(name)
            found = whole_space(None if old is None else old.numpy(), (x.T @ x / len(x)).numpy(), threshold)
            self.bases[name] = torch.from_numpy(found)


def test_three_tasks_equal_plain_loops():
    learner, plain = toy.learner(*FLAGS), Plain(toy.learner(*FLAGS))
    method, apart = BECAME(learner), []
    for task, images in toy.tasks():
        learner.grow_head(task, images)
        during = method.begin(task)
        phase = method.train(task, images, during)
        assert phase.steps == 2 * 2 * 3  # two stages of two epochs
        stable = plain.weights = plain.stage(task, images, phase.batches, range(6), task.index > 0)
        plain.weights = plain.stage(task, images, phase.batches, range(6, 12), False)
        toy.work(phase)
        fisher, free = plain.fisher(task, images), plain.weights
        merge, log = method.merge(task, images, during), {}
        for i in range(merge.steps):
            log |= merge.step(i)
        merge.finish()
        if task.index:
            change = {n: (free[n] - stable[n]).double() for n in free}
            new, old = (sum((of[n] * change[n] ** 2).sum() for n in change) for of in (fisher, plain.precision))
            share = float(new / (new + old))
            plain.weights = {n: (stable[n] + share * change[n]).float() for n in change}
            assert float(log["lambda"]) == pytest.approx(share, rel=2e-3)
            apart.append(share)
        plain.precision = {n: plain.precision[n] + fisher[n] for n in fisher}
        plain.remember(images, 0.9)
        for name, view in zip(learner.flat.names, learner.flat.views(learner.theta), strict=True):
            torch.testing.assert_close(view, plain.weights[name], rtol=1e-3, atol=3e-4)
        for name, basis in plain.bases.items():
            mine, projector = method.memory[name], basis @ basis.T
            inside = (mine.basis @ mine.basis.mT).double()
            inside = torch.eye(len(basis)).double() - inside if mine.retain else inside
            torch.testing.assert_close(inside, projector, rtol=0, atol=2e-2)
    assert all(0.05 < share < 0.95 for share in apart)


def test_the_first_stage_moves_nothing_that_old_inputs_see():
    """After it the linear layers give the old images what they gave before, up to the inputs that the memory leaves out."""
    learner = toy.learner(*FLAGS[:1], "--became.threshold=1")
    method, (first, second, _) = BECAME(learner), toy.tasks()
    learner.grow_head(*first)
    toy.work(method.train(*first, method.begin(first[0])))
    toy.work(method.merge(*first, {}))
    x = learner.plain(first[1].images).flatten(1)
    outputs = learner.backbone.inner(x).detach()
    phase, start = method.train(*second, {}), learner.theta.clone()
    for i in range(6):
        phase.step(i)
    torch.testing.assert_close(learner.backbone.inner(x).detach(), outputs, rtol=0, atol=2e-3)
    assert (learner.theta - start).abs().max() > 5e-3
    for i in range(6, 12):
        phase.step(i)
    assert (learner.backbone.inner(x) - outputs).abs().max() > 5e-2


def test_a_memory_of_the_complement_frees_the_same():
    torch.manual_seed(0)
    x, change = torch.randn(5, 12), torch.randn(3, 12)
    for rows in (2, 10):  # few directions, then most of them
        memory = grown(None, (m := torch.randn(rows, 12)).mT @ m, 0.99999)
        found = free_part(change, memory.basis, memory.retain)
        torch.testing.assert_close(found, memory.free(change.mT).mT.float())
        assert memory.retain == (rows == 10) and (found @ x.mT).abs().max() > 0


def test_without_projection_the_merge_is_with_the_model_before():
    learner = toy.learner("--became.no-project", "--clip=0")
    method = BECAME(learner)
    (first, images), (second, others), _ = toy.tasks()
    for task, its in ((first, images), (second, others)):
        learner.grow_head(task, its)
        before, during = learner.theta.clone(), method.begin(task)
        toy.work(method.train(task, its, during))
        trained = learner.theta.clone()
        toy.work(method.merge(task, its, during))
    change, moved = trained - before, learner.theta - before
    share = float(moved @ change / (change @ change))
    torch.testing.assert_close(moved, share * change, rtol=0, atol=1e-6)
    assert 0 < share < 1 and not method.memory


@pytest.mark.parametrize("stop", [3, 6, 8])
def test_a_run_goes_on_in_both_stages_and_passes(stop):
    """Everything a checkpoint holds after `stop` steps of a phase goes to new objects, which end with the same bits."""
    runs = [toy.learner(*FLAGS), toy.learner(*FLAGS)]
    methods = [BECAME(learner) for learner in runs]
    (first, images), (second, others), _ = toy.tasks()
    runs[0].grow_head(first, images)
    toy.work(methods[0].train(first, images, {}))
    toy.work(methods[0].merge(first, images, {}))
    during = methods[0].begin(second)
    for kind, stops in (("train", stop), ("merge", stop // 2)):
        phase = getattr(methods[0], kind)(second, others, during)
        for i in range(stops):
            phase.step(i)
        runs[1].load_state_dict({k: v.clone() for k, v in runs[0].state_dict().items()})
        methods[1].load_state_dict({k: v.clone() for k, v in methods[0].state_dict().items()})
        same = {k: v.clone() for k, v in during.items()}
        again = getattr(methods[1], kind)(second, others, same)
        again.load({k: v.clone() for k, v in phase.tensors().items()})
        for one in (phase, again):
            for i in range(stops, phase.steps):
                one.step(i)
            one.finish()
        assert torch.equal(runs[0].theta, runs[1].theta)
        assert all(torch.equal(during[k], same[k]) for k in during)
    for a, b in zip(methods[0].state_dict().values(), methods[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_kept_bytes_are_a_fisher_and_the_bases():
    learner = toy.learner(*FLAGS)
    method = BECAME(learner)
    toy.drive(learner, method)
    bases = sum(memory.basis.nbytes for memory in method.memory.values())
    assert len(method.memory) == 3 and bases <= (48 * 24 * 2 + 7 * 4) * 4
    extra = kept_bytes(learner, method) - sum(x.nbytes for x in learner.state_dict().values())
    assert extra == learner.theta.nbytes + bases + len(method.memory)
