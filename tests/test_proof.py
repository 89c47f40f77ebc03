"""Compare PROOF with loops over images and tasks, which keep every projection; attention with nn.MultiheadAttention."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import toy
from torch import nn

from fastmerge.data.rehearsal import Joined
from fastmerge.errors import UserError
from fastmerge.flags import parse
from fastmerge.methods.proof import Proof, TaskProjections
from fastmerge.models.fusion import ATTENTION, FusionHead, attended

FLAGS = ("--clip=0", "--proof.exemplars=13", "--proof.lr=0.05", "--proof.context=2")


def filled(over_batch=False, classes=6, known=(4, 0, 3)):
    """A head with random tensors that knows some classes."""
    head = FusionHead(torch.randn(classes, 5), 3.0, over_batch)
    head.grow(known, None)
    for buffer in head.buffers():
        if buffer.is_floating_point() and buffer.ndim:
            buffer.normal_()
    head.contexts, head.count = torch.randn(4, 5), torch.arange(classes)
    return head


def test_the_attention():
    torch.manual_seed(0)
    head, tokens = filled(), torch.randn(3, 9, 5)
    theirs = nn.MultiheadAttention(5, 1, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([head.query, head.key, head.value]))
        theirs.in_proj_bias.zero_()
        theirs.out_proj.weight.copy_(head.out)
        theirs.out_proj.bias.copy_(head.out_bias)
    norm = nn.LayerNorm(5)
    norm.weight.data, norm.bias.data = head.norm, head.norm_bias
    wanted = norm(tokens + theirs(tokens, tokens, tokens)[0])
    torch.testing.assert_close(attended(tokens, {name: head.get_buffer(name) for name in ATTENTION}), wanted)


def project(x, pairs):
    """The summed outputs of the projections, of length 1."""
    return F.normalize(sum(weight @ x + bias for weight, bias in pairs), dim=0)


class Slow:
    """One image at a time, with all projections of all tasks."""

    def __init__(self, learner):
        self.learner, self.image, self.text, self.contexts = learner, [], [], []
        self.features, self.attention = {}, None  # class -> features of its images

    def begin(self, task, start):
        """start: the parameters that the method draws."""
        own = {name: p.detach().clone().requires_grad_() for name, p in start.items()}
        self.image.append((own["image"], own["image_bias"]))
        self.text.append((own["text"], own["text_bias"]))
        self.contexts.append(own["context"])
        if self.attention is not None:  # it goes on
            own |= {name: self.attention[name].detach().clone().requires_grad_() for name in ATTENTION}
        self.attention = {name: own[name] for name in ATTENTION}
        return own

    def freeze(self):
        detach = lambda pairs: [(w.detach(), b.detach()) for w, b in pairs]  # noqa: E731
        self.image, self.text = detach(self.image), detach(self.text)
        self.contexts = [c.detach() for c in self.contexts]

    def tokens(self, feature):
        known = sorted(self.features)
        image = project(F.normalize(feature, dim=0), self.image)
        texts = [project(self.learner.head.weight[c], self.text) for c in known]
        means = [project(torch.stack(self.features[c]).mean(0), self.image) for c in known]
        tokens = torch.stack([image, *texts, *means, *(row for c in self.contexts for row in c)])
        a, rows = self.attention, []
        for x in tokens:
            near = tokens @ a["key"].T @ (a["query"] @ x) / 5**0.5
            mixed = a["value"] @ (near.softmax(0) @ tokens)
            x = x + a["out"] @ mixed + a["out_bias"]
            rows.append((x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * a["norm"] + a["norm_bias"])
        return image, torch.stack(texts), torch.stack(rows)

    def parts(self, features, over_batch=False):
        k, found = len(self.features), [self.tokens(f) for f in features]
        texts, means = ([rows[1 + part * k : 1 + (part + 1) * k] for *_, rows in found] for part in (0, 1))
        if over_batch:
            texts, means = ([sum(x) / len(x)] * len(x) for x in (texts, means))
        plain = torch.stack([3.0 * text @ image for image, text, _ in found])
        near = [torch.stack([x @ rows[0] for x, (*_, rows) in zip(xs, found, strict=True)]) for xs in (texts, means)]
        return plain, *near


@pytest.mark.parametrize("fusion", ["image", "batch"])
def test_three_tasks_equal_a_loop_over_images(fusion):
    learner = toy.learner(*FLAGS, f"--proof.fusion={fusion}", "--epochs=1")
    learner.head.weight = F.normalize(learner.head.weight, dim=1)
    method, start = Proof(learner), None
    slow = Slow(learner)
    for task, images in toy.tasks():
        t = task.index
        learner.grow_head(task, images)
        for pixels, label in zip(images.images, images.labels.tolist(), strict=True):
            feature = learner.backbone(learner.plain(pixels[None]))[0].detach()
            slow.features.setdefault(label, []).append(F.normalize(feature, dim=0))
        own = slow.begin(task, dict(TaskProjections(method, task).own.named_parameters()))
        start = start or {name: p.detach().clone() for name, p in own.items()}
        joined = Joined(images, method.kept.exemplars, method.kept.labels)
        phase = method.train(task, images, method.begin(task))
        optimiser = torch.optim.SGD(own.values(), lr=1, momentum=0.9, weight_decay=0.05)
        for i in range(phase.steps):
            pixels, labels = joined.batch(phase.batches.rows(i))
            x = learner.augmented(pixels, learner.generator("augment", t, i))
            parts = slow.parts(learner.backbone(x).detach(), fusion == "batch")
            loss = sum(F.cross_entropy(logits, labels) for logits in parts)
            optimiser.zero_grad()
            loss.backward()
            optimiser.param_groups[0]["lr"] = 0.05 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * i / phase.steps)))
            optimiser.step()
            assert float(phase.step(i)["loss"]) == pytest.approx(float(loss.detach()), rel=1e-3)
        phase.finish()
        slow.freeze()
        toy.work(method.merge(task, images, {}))
    assert (own["query"] - start["query"]).abs().max() > 1e-3 and len(method.kept.exemplars) == 12
    x = learner.plain(toy.tasks()[1][1].images[:7])
    features, classes = learner.backbone(x).detach(), torch.tensor([3, 0, 5])
    wanted = sum(slow.parts(features, fusion == "batch")).detach()[:, classes]
    torch.testing.assert_close(learner.head(features, classes), wanted, rtol=1e-3, atol=1e-3)


def test_no_image_depends_on_another_unless_asked():
    torch.manual_seed(0)
    for over_batch in (False, True):
        head, features, classes = filled(over_batch), torch.randn(7, 5), torch.tensor([3, 4])
        alone = torch.cat([head(f[None], classes) for f in features])
        assert torch.allclose(alone, head(features, classes), rtol=1e-4, atol=1e-4) != over_batch


def test_the_head_comes_back_from_its_state():
    torch.manual_seed(0)
    head, features = filled(), torch.randn(7, 5)
    logits = head(features, torch.arange(6))
    assert logits.isfinite().all(0).tolist() == [True, False, False, True, True, False]  # those that it knows
    again = FusionHead.of({name: t.clone() for name, t in head.state_dict().items()})
    assert torch.equal(again(features, torch.arange(6)), logits) and not again.over_batch
    assert FusionHead.of(filled(True).state_dict()).over_batch
    wider = FusionHead(torch.randn(8, 5), 3.0, False)
    wider.adopt(head.state_dict())  # as in a run that continues another
    assert torch.equal(wider(features, torch.arange(6)), logits)


def test_parts_of_a_batch_add_up():
    ends = []
    for flags in ((), ("--micro-batch=3",)):
        learner = toy.learner(*FLAGS, *flags)
        toy.drive(learner, Proof(learner))
        ends.append(learner.head.state_dict())
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_what_is_refused():
    with pytest.raises(
        UserError, match="proof projects the text embeddings .* needs --head text.*given: --head linear"
    ):
        Proof.check(parse(["--method", "proof", "--head", "linear"]), toy.Backbone())
    learner = toy.learner("--proof.exemplars=3", "--epochs=1")
    with pytest.raises(UserError, match="task 2: --proof.exemplars 3 is less than one image for each of 4 pairs"):
        toy.drive(learner, Proof(learner))


def test_a_class_that_returns():
    """It refines its prototype and gets exemplars of the second task too."""
    learner = toy.learner(*FLAGS, "--epochs=1")
    method = Proof(learner)
    (task, images), (_, others) = toy.tasks()[:2]
    others.labels -= 2
    features = []
    for index, part in enumerate((images, others)):
        again = replace(task, index=index)
        learner.grow_head(again, part)
        toy.work(method.train(again, part, method.begin(again)))
        toy.work(method.merge(again, part, {}))
        features.append(F.normalize(learner.backbone(learner.plain(part.images)).detach(), dim=1))
    labels, head = torch.cat([images.labels, others.labels]), learner.head
    assert head.known.tolist() == [0, 1] and method.kept.labels.tolist() == [0, 0, 0, 1, 1, 1] * 2
    for c in (0, 1):
        torch.testing.assert_close(head.sum[c] / head.count[c], torch.cat(features)[labels == c].mean(0))
