"""Compare the three storage protocols with their definitions: where training starts and what is merged."""

import pytest
import torch
import toy

from fastmerge.config import declarations, to_dict
from fastmerge.errors import UserError
from fastmerge.fisher_pass import FisherPass
from fastmerge.merging import build_rule
from fastmerge.merging.rule import Base
from fastmerge.methods import METHODS
from fastmerge.methods.posthoc import PostHoc
from fastmerge.methods.trajectory import Recorded, Reused, Trajectory, saved
from fastmerge.plan import plan, read_method, row_settings, shared_trainings, training_changes
from fastmerge.training import Train


def fit(learner, start, task, images):
    """Train `task` from `start` and return theta_t."""
    learner.theta.copy_(start)
    learner.grow_head(task, images)
    toy.work(Train(learner, task, images))
    return learner.theta.clone()


def magmax(initial, models, scale=0.5):
    best = torch.zeros_like(initial, dtype=torch.float64)
    for theta in models:
        delta = theta.double() - initial.double()
        best = torch.where(delta.abs() >= best.abs(), delta, best)
    return initial.double() + scale * best


def average(initial, models):
    return torch.stack(models).double().mean(0)


def ema(initial, models, weight=0.5):
    merged = initial.double()
    for theta in models:
        merged = (1 - weight) * merged + weight * theta.double()
    return merged


RULES = {"magmax": magmax, "average": average, "ema": ema}


def slow(protocol, init):
    """Return the models after every task, by what is deployed, from the definition of the protocol and of the two axes. All
    rules see the same models, each beside its own merge of the past."""
    learner = toy.learner()
    initial, seen = learner.theta.clone(), []
    merged = dict.fromkeys(RULES, initial)
    after = {deploy: [] for deploy in ("last", *RULES)}
    for task, images in toy.tasks():
        places = {"zero-shot": initial, "last": seen[-1] if seen else initial, **merged}
        theta = fit(learner, places[init], task, images)
        seen.append(theta)
        for name, rule in RULES.items():
            past = merged[name]
            if protocol == "running" and name == "magmax":
                past = initial + (past - initial) / 0.5  # without the rule's scale
            pair = [past, theta] if task.index else [theta]
            if protocol == "full":
                merged[name] = rule(initial, seen).float()
            elif name == "ema":
                merged[name] = (0.5 * past.double() + 0.5 * theta.double()).float()
            elif protocol == "strict" and task.index == 0:
                merged[name] = theta
            else:
                merged[name] = rule(initial, pair).float()
            after[name].append(merged[name])
        after["last"].append(theta)
    return after


STARTS = [(p, init) for p in ("full", "running", "strict") for init in ("zero-shot", "last", *RULES)]
STARTS.remove(("strict", "last"))


@pytest.mark.parametrize(("protocol", "init"), STARTS)
def test_every_start_with_every_deployment_equals_a_plain_loop(protocol, init, tmp_path):
    expected, training = slow(protocol, init), {"zero-shot": "independent", "last": "sequential"}
    share = {training.get(init, f"{protocol}-{init}")}
    for deploy, wants in expected.items():
        learner = toy.learner(f"--init-rule={init}", f"--deploy-rule={deploy}")
        method = PostHoc(learner, Trajectory(tmp_path, share, deploy), "ties", protocol)
        for got, want in zip(toy.drive(learner, method), wants, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert len(list(tmp_path.iterdir())) == toy.TASKS  # all of them shared one training


@pytest.mark.parametrize(
    ("rule", "protocol", "flags", "meant"),
    [
        ("magmax", "full", [], ("last", "magmax")),
        ("magmax", "running", [], ("last", "magmax")),
        ("magmax", "strict", [], ("magmax", "magmax")),
        ("magmax", "full", ["--deploy-rule=average"], ("magmax", "average")),
        ("magmax", "full", ["--init-rule=ema"], ("ema", "magmax")),
        ("ema", "strict", [], ("ema", "ema")),  # TIME's best
    ],
)
def test_the_protocol_chooses_what_is_not_given(rule, protocol, flags, meant, tmp_path):
    learner = toy.learner(*flags)
    after = toy.drive(learner, PostHoc(learner, toy.nowhere(tmp_path), rule, protocol))
    for got, want in zip(after, slow(protocol, meant[0])[meant[1]], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_two_rules_that_need_the_images_share_their_passes(tmp_path):
    """Start at the Fisher merge, deploy RegMean's: a plain loop over both rules."""
    learner = toy.learner("--init-rule=fisher", "--deploy-rule=regmean", "--fisher.labels=data")
    after = toy.drive(learner, PostHoc(learner, toy.nowhere(tmp_path), "average", "full"))

    slow_learner = toy.learner("--fisher.labels=data")
    base = Base.of(slow_learner.flat, 0)
    start, deployed = (build_rule(name, base, slow_learner.config) for name in ("fisher", "regmean"))
    at = base.theta
    for (task, images), got in zip(toy.tasks(), after, strict=True):
        theta = fit(slow_learner, at, task, images)
        start.update(theta, fishers(slow_learner, task, images))
        seen = moments(slow_learner, images)
        deployed.update(theta, {k: (1, seen[name]) for k, name in enumerate(base.names) if name in seen})
        torch.testing.assert_close(got, deployed.merged(out=torch.empty_like(theta)), rtol=1e-3, atol=1e-4)
        at = start.merged(out=torch.empty_like(theta))


def moments(learner, images):
    """X^T X / n of the toy's three linear layers, image by image."""
    backbone, found = learner.backbone, {}
    x = learner.plain(images.images).flatten(1)
    query, key, value = backbone.attn.qkv(x).chunk(3, 1)
    inner = torch.tanh(backbone.inner(x)) + query + torch.tanh(key) * value
    for name, rows in {"inner.weight": x, "attn.qkv.weight": x, "outer.weight": inner}.items():
        found[name] = sum(torch.outer(row, row) for row in rows.detach()) / len(rows)
    return found


def test_strict_keeps_no_unmerged_model_to_start_at():
    config = toy.parse(["--init-rule", "last", "--method", "average"])
    with pytest.raises(UserError, match="--init-rule last: --protocol strict keeps no un-merged model"):
        METHODS["average"].check(config, toy.Backbone())
    METHODS["average"].check(toy.parse(["--init-rule", "last", "--protocol", "full"]), toy.Backbone())


def test_the_protocols_differ(tmp_path):
    found = {}
    for protocol in ("full", "running", "strict"):
        learner = toy.learner()
        found[protocol] = toy.drive(learner, PostHoc(learner, toy.nowhere(tmp_path), "average", protocol))[-1]
    gaps = [
        (found[a] - found[b]).abs().max() for a, b in (("full", "running"), ("full", "strict"), ("running", "strict"))
    ]
    assert min(gaps) > 1e-3


@pytest.mark.parametrize("rule", ["magmax", "task-arithmetic"])
def test_running_equals_full_where_the_merged_vector_is_all_a_rule_needs(rule, tmp_path):
    ends = []
    for protocol in ("full", "running"):
        learner = toy.learner()
        ends.append(toy.drive(learner, PostHoc(learner, toy.nowhere(tmp_path), rule, protocol))[-1])
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def fishers(learner, task, images):
    """Compute the Fisher image by image, with the labels of the data."""
    total = torch.zeros_like(learner.theta)
    classes = torch.tensor(task.classes)
    for k in range(len(images)):
        pixels, labels = images.batch(torch.tensor([k]))
        learner.flat.zero_grad()
        logits = learner.head(learner.backbone(learner.plain(pixels)), classes)
        (-logits.log_softmax(1)[0, classes.tolist().index(labels.item())]).backward()
        total += learner.flat.gradient.square() / len(images)
    learner.flat.zero_grad()
    return total


def test_fisher_rule_under_strict_keeps_the_fisher_of_the_past(tmp_path):
    flags = ["--fisher.labels=data"]
    learner = toy.learner(*flags)
    method = PostHoc(learner, toy.nowhere(tmp_path), "fisher", "strict")
    after = toy.drive(learner, method)

    slow_learner = toy.learner(*flags)
    merged, known = slow_learner.theta.clone(), None
    for task, images in toy.tasks():
        theta = fit(slow_learner, merged, task, images)
        fisher = fishers(slow_learner, task, images).double()
        if known is None:
            merged, known = theta, fisher
        else:
            total, t = known + fisher, task.index + 1
            weighed = (known * merged + fisher * theta) / total
            merged = torch.where(total == 0, ((t - 1) * merged + theta) / t, weighed).float()
            known = total
        torch.testing.assert_close(after[task.index], merged, rtol=1e-4, atol=1e-5)
    assert set(method.rules["fisher"].state_dict()) == {"fisher", "count", "fed"}  # no second merged model


@pytest.mark.parametrize(
    ("rule", "protocol", "models", "flags"),
    [
        ("ema", "strict", 1, []),
        ("ema", "full", 3, []),  # merged, trained, ema's own
        ("average", "full", 3, ["--init-rule=ema"]),  # merged, mean, ema's
        ("average", "running", 2, ["--init-rule=ema"]),  # merged, start
        ("average", "strict", 2, ["--init-rule=ema"]),
        ("average", "strict", 2, ["--init-rule=zero-shot"]),  # plus theta_init
        ("average", "full", 2, ["--deploy-rule=last"]),  # trained, mean
        ("average", "running", 1, ["--init-rule=last", "--deploy-rule=last"]),
        ("average", "full", 3, []),  # merged, trained, mean
        ("average", "running", 2, []),
        ("average", "strict", 1, []),
        ("magmax", "full", 4, []),  # plus theta_init
        ("magmax", "running", 3, []),
        ("magmax", "strict", 2, []),
        ("ties", "full", 7, []),
        ("ties", "strict", 2, []),
        ("fisher", "strict", 2, []),
    ],
)
def test_kept_between_tasks(rule, protocol, models, flags, tmp_path):
    learner = toy.learner(*flags)
    method = PostHoc(learner, toy.nowhere(tmp_path), rule, protocol)
    for task, images in toy.tasks():
        learner.grow_head(task, images)
        during = method.begin(task)
        toy.work(method.train(task, images, during))
        toy.work(method.merge(task, images, during))
        vectors = [t for t in (learner.state_dict() | method.state_dict()).values() if t.shape == learner.theta.shape]
        assert len(vectors) == models


@pytest.mark.parametrize("head", ["text", "linear"])
def test_shared_training_ends_with_the_same_bits(head, tmp_path):
    def ends(trajectory):
        learner = toy.learner(head=head)
        models = toy.drive(learner, PostHoc(learner, trajectory, "ties", "full"))
        return [*models, *(v.clone() for v in learner.head.state_dict().values())]

    alone = ends(Trajectory(tmp_path / "a", ()))
    assert not (tmp_path / "a").exists()
    shared = Trajectory(tmp_path / "b", {"sequential"}, "first")
    first, second = ends(shared), ends(Trajectory(tmp_path / "b", {"sequential"}, "second"))
    assert len(list((tmp_path / "b").iterdir())) == toy.TASKS
    for a, b, c in zip(alone, first, second, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    shared.delete()
    assert not (tmp_path / "b").exists()


def test_only_the_first_of_several_trains(tmp_path):
    trajectory, learner = Trajectory(tmp_path, {"sequential"}, "first"), toy.learner()
    other = Trajectory(tmp_path, {"sequential"}, "second")
    task, images = toy.tasks()[0]
    learner.grow_head(task, images)
    phase = trajectory.train(learner, task, images)
    assert type(phase) is Recorded
    toy.work(phase)
    assert type(trajectory.train(learner, task, images)) is Recorded  # a run that goes on from before its own file
    again = other.train(learner, task, images)
    assert type(again) is Reused and again.steps == 0
    again.finish()
    assert again.seconds_elsewhere > 0
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"task-1\.safetensors.*Delete it"):
        other.train(learner, task, images)
    file.unlink()
    assert type(trajectory.train(learner, task, images, "independent")) is Train  # no other run needs it


def test_plan_shares_what_can_be_shared():
    methods = ["--method", "trm", "finetune", "magmax", "average", "--protocol", "full", "running", "strict"]
    scenario = type("S", (), {"joined": lambda self: self})()
    runs = plan(toy.parse([*methods, "--seeds", "0", "1"]), scenario)
    assert [r.label for r in runs[:4]] == ["trm", "finetune", "magmax-full", "magmax-running"] and len(runs) == 17
    assert (runs[16].label, runs[16].seed) == ("nearest-mean", 0)  # beside every table
    assert [r.label for r in runs if r.seed == 0 and r.epochs["train"]] == [
        "trm", "finetune", "magmax-strict", "average-strict",
    ]  # fmt: skip
    assert shared_trainings(runs, keep=False) == {"sequential"}
    runs = plan(
        toy.parse(
            ["--method", "finetune", "ties", "--protocol", "full", "--init-rule", "zero-shot", "--no-nearest-mean"]
        ),
        scenario,
    )
    assert [r.trajectory for r in runs] == ["sequential", "independent"]
    assert shared_trainings(runs, keep=False) == set()
    assert shared_trainings(runs, keep=True) == {"sequential", "independent"}


def test_rows_that_start_alike_share_one_training():
    specs = [
        "average:init_rule=ema",
        "ties:init-rule=ema,density=0.3",
        "ema:init_rule=ema",
        "ema:init_rule=ema,weight=0.3",
    ]
    specs += ["average:init_rule=fisher,fisher.labels=data", "magmax:deploy_rule=wise-ft,alpha=0.3", "magmax"]
    runs = plan(toy.parse(["--method", *specs, "--protocol", "full", "strict", "--no-nearest-mean"]), None)
    found = {run.label: (run.trajectory, run.epochs["train"]) for run in runs}
    assert found == {
        "average-full(init_rule=ema)": ("full-ema", 3),
        "average-strict(init_rule=ema)": ("strict-ema", 3),
        "ties-full(init-rule=ema,density=0.3)": ("full-ema", 0),
        "ties-strict(init-rule=ema,density=0.3)": ("strict-ema", 0),
        "ema-full(init_rule=ema)": ("full-ema", 0),
        "ema-strict(init_rule=ema)": ("strict-ema", 0),
        "ema-full(init_rule=ema,weight=0.3)": ("full-ema(ema.weight=0.3)", 3),
        "ema-strict(init_rule=ema,weight=0.3)": ("strict-ema(ema.weight=0.3)", 3),
        "average-full(init_rule=fisher,fisher.labels=data)": ("full-fisher(fisher.labels=data)", 3),
        "average-strict(init_rule=fisher,fisher.labels=data)": ("strict-fisher(fisher.labels=data)", 3),
        "magmax-full(deploy_rule=wise-ft,alpha=0.3)": ("full-magmax", 3),
        "magmax-strict(deploy_rule=wise-ft,alpha=0.3)": ("strict-magmax", 3),
        "magmax-full": ("sequential", 3),
        "magmax-strict": (None, 3),
    }
    assert {run.label: run.epochs["merge"] for run in runs if run.epochs["merge"]} == dict.fromkeys(
        ("average-full(init_rule=fisher,fisher.labels=data)", "average-strict(init_rule=fisher,fisher.labels=data)"), 1
    )
    assert shared_trainings(runs, keep=False) == {"full-ema", "strict-ema"}


def test_training_shared_from_a_merge_ends_with_the_same_bits(tmp_path):
    def ends(trajectory):
        learner = toy.learner("--init-rule=ema")
        return toy.drive(learner, PostHoc(learner, trajectory, "ties", "running"))

    alone = ends(toy.nowhere(tmp_path))
    first, second = (ends(Trajectory(tmp_path / "b", {"running-ema"}, run)) for run in ("first", "second"))
    for a, b, c in zip(alone, first, second, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_a_method_with_settings_of_its_own():
    specs = ["cmm", "cmm:lam=0.3,tangent=false,align-epochs=0", "dare-ties:density=0.5,p=0.2", "ewc:lam=5,labels=data"]
    config = toy.parse(["--method", *specs, "--protocol", "full"])
    runs = plan(config, None)
    assert [r.label for r in runs[:-1]] == [
        "cmm", "cmm(lam=0.3,tangent=false,align-epochs=0)", "dare-ties-full(density=0.5,p=0.2)", "ewc(lam=5,labels=data)",
    ]  # fmt: skip
    assert runs[0].config is config and runs[0].epochs["merge"] == 1
    cmm, dare, ewc = (r.config for r in runs[1:-1])
    assert (cmm.cmm.lam, cmm.cmm.tangent, cmm.cmm.align_epochs) == (0.3, False, 0) and runs[1].epochs["merge"] == 0
    assert (dare.ties.density, dare.dare.p, ewc.ewc.lam, ewc.fisher.labels) == (0.5, 0.2, 5.0, "data")
    assert cmm.training == config.training and config.cmm.lam == 0.4


@pytest.mark.parametrize(
    ("spec", "group", "setting"),
    [
        ("dare-ties:scale=0.7", "ties", "scale"),  # it does not read that of dare
        ("dare:scale=0.7", "dare", "scale"),
        ("cofima:lam=0.7", "cofima", "lam"),
        ("coma:lam=0.7", "coma", "lam"),
        ("ties:init_rule=dare,scale=0.7", "ties", "scale"),  # the method's own, not that of the other rule
        ("ties:init_rule=dare,dare.scale=0.7", "dare", "scale"),
        ("dare-ties:init_rule=dare,dare.scale=0.7", "dare", "scale"),  # here the other rule reads it
        ("cofima:init_rule=fisher,lam=0.7", "cofima", "lam"),
        ("cofima:init_rule=fisher,fisher.lam=0.7", "fisher", "lam"),
    ],
)
def test_which_of_two_settings_with_one_name_a_row_sets(spec, group, setting):
    _, config = read_method(spec, toy.parse(["--protocol", "full"]))
    values, usual = to_dict(config), to_dict(toy.parse(["--protocol", "full"]))
    changes = {(g, s) for g in values for s in values[g] if g != "training" and values[g][s] != usual[g][s]}
    assert changes == {(group, setting)} and values[group][setting] == 0.7


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dare-ties:dare.scale=2", "expected dare-ties:SETTING=VALUE"),  # TIES has the scale
        ("pam:lam=0.2", "expected pam:SETTING=VALUE"),
        ("became:accumulate=ema", "expected became:SETTING=VALUE"),
        ("l2p:weight_decay=0.1", "expected l2p:SETTING=VALUE"),
        ("coop:head_lr=0.1", "expected coop:SETTING=VALUE"),
        ("hide:training.lr=0.1", "expected hide:SETTING=VALUE"),
        ("cofima:fisher.lam=0.2", "expected cofima:SETTING=VALUE"),
        ("ties:densty", "expected ties:SETTING=VALUE.*Did you mean: density"),
        ("ties:densty=0.5", "Did you mean: density"),
        ("ties:density", "density needs a value, as in ties:density=VALUE"),
        ("ties:density=2", "--ties.density 2.0: expected above 0"),
        ("cmm:tangent=maybe", "cmm.tangent is true or false"),
        ("cmm:lam=much", "cmm.lam much: expected a number"),
        ("average:scale=1", "Its settings are: .*epochs"),
        ("nearest-mean:lr=1", "nearest-mean has no settings"),
        ("finetune:epoch=5", "Did you mean: epochs"),
        ("finetune:merge_epochs=5", "expected finetune:SETTING=VALUE"),  # it has no merge phase
        ("finetune:epochs=-1", "--epochs -1: expected 0 or more"),
        ("finetune:epochs=few", "--epochs few: expected a whole number"),
        ("finetune:seeds=1", "expected finetune:SETTING=VALUE"),
        ("finetune:precision=bf16", "expected finetune:SETTING=VALUE"),  # one for the command
        ("finetune:lr=1,lr=2", "lr is given twice"),
        ("ewc:lora_rank=2", "expected ewc:SETTING=VALUE"),
        ("tise:scale=1", "unknown method 'tise'"),
        ("average:init_rule=emma", "--init-rule emma: expected one of zero-shot, last, average.*Did you mean: ema"),
        ("average:deploy-rule=zero-shot", "--deploy-rule zero-shot: expected one of last, average"),
        ("ties:init_rule=ema,deploy_rule=average,density=0.3", "expected ties:SETTING=VALUE"),  # ties merges nothing
        ("finetune:init_rule=ema", "expected finetune:SETTING=VALUE"),
    ],
)
def test_bad_settings_of_a_method(spec, message):
    with pytest.raises(UserError, match=message):
        read_method(spec, toy.parse([]))


def test_settings_of_training_for_one_run():
    specs = ["trm:merge_epochs=4, lambda0=0", "trm:lr=0.5,training.lr=1e-3", "finetune:lr=1e-4", "finetune:epochs=7"]
    specs += ["average:epochs=7", "magmax:scale=0.7,epochs=7", "finetune"]
    runs = plan(toy.parse(["--method", *specs, "--protocol", "full", "strict", "--no-nearest-mean"]), None)
    assert [r.label for r in runs] == [
        "trm(merge_epochs=4,lambda0=0)", "trm(lr=0.5,training.lr=1e-3)", "finetune(lr=1e-4)", "finetune(epochs=7)",
        "average-full(epochs=7)", "average-strict(epochs=7)", "magmax-full(scale=0.7,epochs=7)",
        "magmax-strict(scale=0.7,epochs=7)", "finetune",
    ]  # fmt: skip
    first, second = (r.config for r in runs[:2])
    assert (first.training.merge_epochs, first.trm.lambda0, runs[0].epochs["merge"]) == (4, 0, 4)
    assert (second.trm.lr, second.training.lr) == (0.5, 1e-3)
    # who trains alike shares one training
    shared = [
        "sequential(lr=0.0001)",
        "sequential(epochs=7)",
        "sequential(epochs=7)",
        None,
        "sequential(epochs=7)",
        None,
    ]
    assert [r.trajectory for r in runs] == [None, None, *shared, "sequential"]
    assert [r.epochs["train"] for r in runs[2:]] == [3, 7, 0, 7, 0, 7, 3]
    assert shared_trainings(runs, keep=False) == {"sequential(epochs=7)"}
    with pytest.raises(UserError, match="the same settings once"):
        plan(toy.parse(["--method", "finetune:lr=1", "finetune: lr = 1"]), None)


class Scenario:
    joined = classmethod(lambda cls: cls)


@pytest.mark.parametrize("name", METHODS)
def test_what_a_row_may_set(name):
    """Walks all methods and their numbers: the value reaches the run's config, and what determines the run."""
    config = toy.parse(["--no-nearest-mean"])
    for setting, (group, known) in row_settings(name, config).items():
        old = getattr(getattr(config, group), known)
        if isinstance(old, bool) or not isinstance(old, int | float):
            continue
        least = int(declarations()[group][known][0].at_least or 1)
        new = least if isinstance(old, int) and old != least else 0.5 if isinstance(old, float) and old != 0.5 else old
        (run,) = plan(toy.parse(["--method", f"{name}:{setting}={new}", "--no-nearest-mean"]), Scenario)
        assert getattr(getattr(run.config, group), known) == new
        assert run.label.endswith(f"({setting}={new})")
        changed = {known: new} if group == "training" and new != old else {}
        assert training_changes(run.config, config) == changed


# -- the Fisher itself ----------------------------------------------------------------------------------------------------


def run_pass(*flags):
    learner = toy.learner(*flags)
    task, images = toy.tasks()[0]
    learner.grow_head(task, images)
    passed = FisherPass(learner, task, images)
    for i in range(passed.steps):
        passed.step(i)
    return learner, task, images, passed


def test_fisher_is_per_image():
    learner, task, images, passed = run_pass("--fisher.labels=data")
    torch.testing.assert_close(passed.result(), fishers(learner, task, images), rtol=1e-4, atol=1e-7)


def test_drawn_labels_are_those_of_multinomial():
    learner, task, images, passed = run_pass()
    chances = learner.head(learner.backbone(learner.plain(images.images)), torch.tensor(task.classes)).softmax(1)
    for i in range(5):
        want = torch.multinomial(chances.detach(), 1, generator=learner.generator("fisher", task.index, i))[:, 0]
        assert torch.equal(passed.drawn(images.images, i), want)


def test_fisher_of_some_images_with_a_floor():
    learner, task, images, passed = run_pass("--fisher.labels=data", "--fisher.images=11", "--fisher.floor=0.5")
    chosen = torch.cat([passed.batches.rows(i) for i in range(3)])[:11]
    few = type(images)(images.images[chosen], images.labels[chosen], 0)
    torch.testing.assert_close(passed.result(), fishers(learner, task, few) + 0.5, rtol=1e-4, atol=1e-7)


def test_fisher_of_the_models_own_labels_is_the_information():
    """The mean over many draws is close to the expectation, sum_c p_c (grad log p_c)^2."""
    learner, task, images, _ = run_pass()
    classes, exact = torch.tensor(task.classes), torch.zeros_like(learner.theta)
    for k in range(len(images)):
        pixels, _ = images.batch(torch.tensor([k]))
        for c in range(2):
            learner.flat.zero_grad()
            logs = learner.head(learner.backbone(learner.plain(pixels)), classes).log_softmax(1)[0]
            logs[c].backward()
            exact += logs[c].exp().detach() * learner.flat.gradient.square() / len(images)
    drawn = torch.zeros_like(exact)
    for seed in range(60):
        passed = FisherPass(learner, task, images)
        learner.seed = seed
        for i in range(passed.steps):
            passed.step(i)
        drawn += passed.result() / 60
    assert (drawn - exact).norm() < 0.2 * exact.norm() < (fishers(learner, task, images) - exact).norm()
    learner.seed = 0


def test_fisher_per_batch_squares_the_mean_gradient():
    learner, task, images, passed = run_pass("--fisher.labels=data", "--fisher.per=batch")
    want, classes = torch.zeros_like(learner.theta), torch.tensor(task.classes)
    for i in range(3):
        pixels, labels = images.batch(passed.batches.rows(i))
        learner.flat.zero_grad()
        logits = learner.head(learner.backbone(learner.plain(pixels)), classes)
        torch.nn.functional.cross_entropy(logits, labels).backward()
        want += len(labels) / len(images) * learner.flat.gradient.square()
    torch.testing.assert_close(passed.result(), want, rtol=1e-4, atol=1e-8)


def test_two_processes_train_the_same_model(tmp_path):
    """Each began before the other one's file was there: the file of the first to finish stays, and both go on."""
    ends, phases = [], []
    for name in ("first", "second"):
        learner, (task, images) = toy.learner(), toy.tasks()[0]
        learner.grow_head(task, images)
        phases.append(Trajectory(tmp_path, {"sequential"}, name).train(learner, task, images))
    (path,) = {phase.path for phase in phases}
    for phase in phases:
        toy.work(phase)
        ends.append((phase.learner.theta.clone(), path.read_bytes(), phase.bytes_written > 0))
    assert torch.equal(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]
    assert [written for *_, written in ends] == [True, False] and saved(path)[2] == "first"
