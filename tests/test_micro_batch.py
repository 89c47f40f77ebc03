"""`--micro-batch`, or too little memory: a step in parts has the gradients of the whole batch up to rounding, in every
phase of every method."""

import pytest
import torch
import toy
from test_methods import CASES, FLAGS, build, one_task

from fastmerge.methods.trm import TRM, Search
from fastmerge.setup import Setup

SIZE = 3


def in_parts(learner):
    learner.parts.micro_batch = SIZE


def short_of_memory(learner):
    """No more than five images fit; a batch has eight."""

    def refuse(module, given):
        if len(given[0]) > 5:
            raise torch.OutOfMemoryError("a test says so")

    learner.backbone.register_forward_pre_hook(refuse)


def first_step(phase, learner, largest):
    """The terms and gradients of a phase's first step. largest: gets the size of every batch that is differentiated."""

    def note(module, given):
        if torch.is_grad_enabled():
            largest.append(given[0].shape[0])

    hook = learner.backbone.register_forward_pre_hook(note)
    terms = learner.parts.attempt(lambda: phase.step(0))
    hook.remove()
    fisher = getattr(phase, "fisher", None)  # the tensor of a pass, or the pass of a merge rule
    gradients = [] if fisher is None else [getattr(fisher, "fisher", fisher)]
    moments = getattr(phase, "moments", phase)  # likewise
    gradients += getattr(moments, "totals", {}).values()
    if hasattr(phase, "sums"):
        gradients += [x for x in phase.sums.tensors().values() if x.is_floating_point()]
    if hasattr(phase, "optimiser"):
        every = [p.grad for group in phase.optimiser.param_groups for p in group["params"]]
        gradients += [grad for grad in every if grad is not None]  # HiDe's prompts have none before their part
    return terms, [gradient.detach().clone() for gradient in gradients]


@pytest.mark.parametrize(
    ("name", "protocol", "how"),
    [(*case, in_parts) for case in CASES] + [(*case, short_of_memory) for case in CASES if case[1] in (None, "strict")],
)
def test_every_phase_of_every_method(name, protocol, how, tmp_path):
    runs = [build(name, protocol, tmp_path) for _ in range(2)]
    (first, second), largest = toy.tasks()[:2], []
    steps = 0
    for run in runs:
        one_task(*run, *first)
    how(runs[1][0])  # after the first task
    for learner, _ in runs:
        learner.grow_head(*second)
    during = [method.begin(second[0]) for _, method in runs]
    for make in ("train", "merge"):
        phases = [getattr(method, make)(*second, d) for (_, method), d in zip(runs, during, strict=True)]
        if phases[0] is None:
            continue
        if phases[0].steps:
            steps += 1
            terms, gradients = first_step(phases[0], runs[0][0], [])
            its_terms, its_gradients = first_step(phases[1], runs[1][0], largest)
            assert terms.keys() == its_terms.keys() and len(gradients) == len(its_gradients) > 0
            for key, value in terms.items():
                torch.testing.assert_close(its_terms[key], value, rtol=1e-4, atol=1e-6, msg=f"{make}: {key}")
            for found, wanted in zip(its_gradients, gradients, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
        for phase, (learner, _) in zip(phases, runs, strict=True):
            phase.finish()
            learner.flat.theta.data.copy_(runs[0][0].theta)  # the next phase starts at the same weights
    assert not largest or max(largest) <= (SIZE if how is in_parts else 8)
    if how is short_of_memory:
        assert set(runs[1][0].parts.sizes.values()) <= {4} and (runs[1][0].parts.sizes or not largest)
    assert steps or name in ("nearest-mean",)


@pytest.mark.parametrize("flags", [[], ["--trm.curvature", "difference"], ["--trm.lambda1", "0"], ["--lora-rank", "2"]])
def test_the_search_on_a_vit(flags):
    """With class tokens and attention, which the toy lacks; the parts add up to the slopes of the whole batch."""
    setup = Setup(toy.parse(["--batch-size", "16", *FLAGS[:2], *flags]))
    task = setup.scenario.tasks[1]
    images = setup.cache.get(setup.dataset.train, task.train[:32])
    found = []
    for size in ([], ["--micro-batch", "5"]):
        learner = setup.learner(0, config=toy.parse(["--batch-size", "16", *FLAGS[:2], *flags, *size]))
        previous = learner.theta.clone()
        learner.theta.add_(
            1e-3 * torch.randn(previous.shape, generator=torch.Generator().manual_seed(1)) * (previous != 0)
        )
        search = Search(TRM(learner), task, images, previous)
        terms = search.step(0)
        found.append((terms, search.coefficients.grad))
    (terms, slopes), (its_terms, its_slopes) = found
    for key in terms:
        torch.testing.assert_close(its_terms[key], terms[key], rtol=1e-4, atol=1e-6, msg=key)
    rtol = 0.03 if "difference" in flags else 1e-3  # its step is chosen on other images
    torch.testing.assert_close(its_slopes, slopes, rtol=rtol, atol=1e-3 * float(slopes.abs().max()))
