"""Every setting, declared once: default, default for the tiny model, bounds, unit, source, and what it does.

Help texts (help.py), checks and resolved defaults come from these declarations. `Config` is the resolved type;
`flags.resolve` fills what a command line leaves open. A run's `config.json` holds the resolved values, so it repeats the run.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from fastmerge.declaration import Declaration, setting
from fastmerge.errors import UserError
from fastmerge.settings.lora import InfLoRASettings, SDLoRASettings
from fastmerge.settings.merging import (
    BecameSettings,
    BreadcrumbsSettings,
    CLIPAdapterSettings,
    CMMSettings,
    CofimaSettings,
    ComaSettings,
    DareSettings,
    DellaSettings,
    EMASettings,
    EWCSettings,
    FisherSettings,
    IsoCSettings,
    LwFSettings,
    MagMaxSettings,
    OPCMSettings,
    PAMSettings,
    RegMeanSettings,
    SCESettings,
    TaskArithmeticSettings,
    TiesSettings,
    TRMSettings,
    TSVSettings,
    WiseFTSettings,
)
from fastmerge.settings.prompts import CodaSettings, DualPromptSettings, HiDeSettings, L2PSettings
from fastmerge.settings.statistics import (
    CLGCBMSettings,
    ICaRLSettings,
    ProofSettings,
    RanPACSettings,
    RAPFSettings,
    SLCASettings,
)
from fastmerge.settings.text import AttriCLIPSettings, CoOpSettings, MaPLeSettings, VPTSettings


def declarations() -> dict[str, dict[str, tuple[Declaration, Any]]]:
    """group -> setting -> (declaration, default of `Config`)."""
    return {
        group.name: {
            f.name: (f.metadata["declaration"], f.default)
            for f in dataclasses.fields(group.default_factory)  # type: ignore[arg-type]  # a dataclass is its factory
        }
        for group in dataclasses.fields(Config)
    }


def flag_of(group: str, name: str) -> str:
    """The flag of a setting, without dashes in front."""
    return (name if group in PLAIN_GROUPS else f"{group}.{name}").replace("_", "-")


def no_flag_of(group: str, name: str) -> str:
    """The flag that switches a setting off, without dashes in front: no-flip, trm.no-merge-first."""
    before, dot, last = flag_of(group, name).rpartition(".")
    return f"{before}{dot}no-{last}"


def check(config: Config) -> None:
    """Check every value that can be checked without data.

    Raises:
        UserError: naming the flag, what was given, and what was expected.
    """
    for group, settings in declarations().items():
        for name, (declaration, _) in settings.items():
            declaration.check(f"--{flag_of(group, name)}", getattr(getattr(config, group), name))
    if (config.model.mean is None) != (config.model.std is None):
        raise UserError("--mean and --std belong together: give both or none")
    _check_sizes(config.scenario)
    if config.data.retain is not None and len(config.data.retain) not in (1, 2):
        raise UserError(
            f"--retain {' '.join(config.data.retain)}: expected the name of a data set, and its folder if it has one"
        )
    if not config.data.dataset or config.data.data_root == ():
        raise UserError(f"--{'data-root' if config.data.dataset else 'dataset'} needs a value")
    several, scenario = len(config.data.dataset) > 1, config.scenario.scenario
    if several and scenario == "dil":
        raise UserError(
            "--scenario dil: the domains of one data set are tasks; for several data sets use datasets or cil"
        )
    if not several and scenario == "datasets" and config.run.continue_from is None:
        raise UserError(
            f"--scenario datasets: every task is another data set, but there is only {config.data.dataset[0]}; name several "
            "with --dataset, or choose cil or dil"
        )
    for name in ("method", "protocol", "seeds"):
        values, one = getattr(config.training, name), name.removesuffix("s")
        if not values:
            raise UserError(f"--{name} {values}: expected at least one {one}")
        if len(set(values)) < len(values):
            raise UserError(f"--{name} {values}: expected each {one} once")


def _check_sizes(scenario: ScenarioSettings) -> None:
    flags = {"--first-classes": scenario.first_classes, "--task-sizes": scenario.task_sizes}
    given = [flag for flag, value in flags.items() if value is not None]
    if len(given) > 1:
        raise UserError(
            "--first-classes and --task-sizes: give one of them; --task-sizes can begin with the first size"
        )
    if given and scenario.scenario != "cil":
        raise UserError(f"{given[0]} is for --scenario cil, where the classes are split into tasks; leave it out")
    if scenario.task_sizes == ():
        raise UserError("--task-sizes: expected at least one number, as in --task-sizes 50 10")


EMBEDDED = ("glyphs", "glyphs-hard")  # data sets of the package: no root, and the backbone is the embedded one


@dataclass
class DataSettings:
    dataset: tuple[str, ...] = setting(
        ("glyphs",),
        "glyphs, glyphs-hard (embedded) | folder | imagenet1k | cifar100 | cifar10 | imagenet-r | imagenet-a | cub200 | "
        "cars | domainnet | office31 | office-home | pacs | tiny-imagenet | mnist | svhn | eurosat | resisc45 | sun397 | "
        "dtd | gtsrb | huggingface | webdataset (docs/DATA.md), or a loader of yours, PACKAGE.MODULE:LOADER. Several are "
        "joined: classes of the same name are one class.",
    )
    data_root: tuple[str, ...] | None = setting(
        None,
        "Folder that contains the data set. For several data sets one that contains them all, or one for each. It is "
        "never written to.",
    )
    split_file: str | None = setting(
        None,
        "A list of the images for training and for testing, in the form in which it is published (docs/DATA.md), or a "
        "folder of such lists. For data sets in folders; it replaces their own split.",
    )
    test_part: str | None = setting(
        None,
        "The folder, or the part of the split file, for testing, where there are several, such as val.",
        derived="test if it has labels, else val, valid or validation",
    )
    retain: tuple[str, ...] | None = setting(
        None,
        "A data set that no task trains on, and its folder: NAME [DIR]. After every task the model classifies its test "
        "images among its own class names; the table has the change against the starting model (zero-shot retention). For "
        "text heads.",
    )
    template: str | None = setting(
        None,
        "Prompts of a text head: openai80 | simple7 | a text with {} for the class name | a file with one per line.",
        derived="those published for the data set",
    )
    class_names: str | None = setting(
        None,
        "A file of class names: one per line in natural order, `folder<tab>name` or `wnid name` lines, or JSON.",
        derived="from the folders, or those published",
    )
    download: bool = setting(
        False,
        "Allow downloads (data sets through torchvision, weights from their hub). Without it nothing is fetched.",
    )
    skip_bad_images: bool = setting(
        False,
        "Skip unreadable images and count them; otherwise the first one stops the run, and this flag lets it continue.",
    )
    crop_scale: float = setting(
        0.9,
        "Smallest area of the random training crop; 0.9 is open_clip's train transform, 0.05 PILOT's.",
        unit="fraction of the image",
        above=0,
        at_most=1,
    )
    flip: bool | None = setting(
        None,
        "Random horizontal flips in training.",
        derived="as the data set says: on for published photos, else off",
    )
    cache_gb: float | None = setting(
        None,
        "Room for decoded images (uint8, on the device), each for training and for test. Images beyond it are streamed.",
        unit="GB",
        at_least=0,
        derived="a third of a GPU's free memory; on the CPU 8, or a quarter of the free memory where that is less",
    )


LATER_CLASSES = 10  # of the tasks after the first one, if --first-classes comes without --tasks


@dataclass
class ScenarioSettings:
    scenario: Literal["cil", "dil", "datasets"] = setting(
        "cil",
        "cil, class-incremental: new classes per task. dil, domain-incremental: all classes, a new domain per task. "
        "datasets: another data set per task, with its own classes.",
        derived="cil; with several data sets datasets; with a preset as in the paper",
    )
    tasks: int | None = setting(
        None,
        "Number of tasks.",
        at_least=1,
        derived="10, embedded data 5, fewer where a task would have less than two classes; 1 for a run that continues "
        "another; with --scenario dil one per domain, with datasets one per data set",
    )
    first_classes: int | None = setting(
        None,
        "Classes of the first task. --tasks splits the others evenly; "
        f"without it every later task has {LATER_CLASSES} classes.",
        at_least=1,
    )
    task_sizes: tuple[int, ...] | None = setting(
        None,
        "Classes of every task. The last size repeats until no class is left: 20 gives tasks of 20, and 50 10 a first "
        "task of 50 and then tasks of 10.",
        at_least=1,
    )
    top_classes: int | None = setting(
        None,
        "Use only this many classes, those with the most training images. 200 on domainnet gives DN* of the P&M paper.",
        at_least=1,
    )
    class_order: str = setting(
        "1993",
        "natural | 1993 (numpy's permutation of that seed, PyCIL/PILOT) | inverse:SEED (its inverse, mammoth) | "
        "shuffle:SEED (Python's random.shuffle, CODA-Prompt) | a file of class names or indices, in any published form "
        "(JSON, YAML, text), names:FILE or indices:FILE where both are possible. name-sorted: (magmax, CMM) or wnid-sorted: "
        "in front numbers the classes that way first; alone they are orders. With dil these are domains, with datasets "
        "data sets.",
        derived="1993; with --scenario dil and datasets natural",
    )
    validation: float = setting(
        0.0,
        "Hold out this part of every class's training images and evaluate on it instead of the test images, to "
        "choose settings. 0: train on all images, evaluate on the test images.",
        unit="fraction",
        at_least=0,
        below=1,
    )
    eval_classes: Literal["seen", "all"] = setting(
        "seen",
        "Candidate classes at test time: those seen so far (usual), or all of the data set (magmax's code).",
    )


@dataclass
class ModelSettings:
    model: str = setting(
        "ViT-B-16-quickgelu",
        "tiny (embedded) | any open_clip model | any timm ViT.",
        derived="tiny for embedded data, else ViT-B-16-quickgelu",
    )
    pretrained: str = setting(
        "openai",
        "Tag | checkpoint file | folder of a finished run | none (random weights).",
        derived="glyphs for tiny, openai for ViT-B-16-quickgelu",
    )
    mean: tuple[float, float, float] | None = setting(
        None,
        "Mean of the three colour channels, for normalisation; give the deviation too.",
        unit="of pixels in 0..1",
        at_least=0,
        at_most=1,
        derived="as the weights were trained",
    )
    std: tuple[float, float, float] | None = setting(
        None,
        "Standard deviation of the three colour channels.",
        unit="of pixels in 0..1",
        above=0,
        derived="as the weights were trained",
    )
    head: Literal["text", "linear", "prototype"] | None = setting(
        None,
        "Frozen text embeddings | a linear layer that grows | class means of the starting model.",
        derived="text where the model has a text tower, else prototype",
    )


@dataclass
class TrainingSettings:
    preset: Literal["trm", "cmm", "pam"] | None = setting(
        None,
        "Settings of a paper: method, backbone, head, rates, epochs and number of tasks, for its data sets. Other flags "
        "override them; the header says what comes from where (presets.py).",
    )
    method: tuple[str, ...] = setting(
        ("trm",),
        "One or more of: trm, cmm, pam, became; the merge rules average, task-arithmetic, ties, dare, dare-ties, "
        "magmax, randmix, stock, slerp, fisher, cofima, coma, ema, wise-ft, regmean, iso-c, tsv, opcm, knots, breadcrumbs, "
        "sce, karcher, nuslerp, della, della-linear (each with --protocol); the baselines finetune, joint, lwf, ewc, "
        "clip-adapter, nearest-mean, clg-cbm, icarl, proof, ranpac, rapf, slca; LoRA: inflora, sdlora; prompts in a frozen "
        "backbone: l2p, dualprompt, coda, hide; of the text tower: coop, vpt, attriclip, maple. "
        "NAME:SETTING=VALUE,... changes settings of the method or "
        "of training for one run, as in cmm:lam=0.3 cmm:tangent=false finetune:lr=1e-4 trm:merge_epochs=1,lambda0=0 "
        "(trm:training.lr where trm has a setting lr too).",
        derived="trm; for embedded data also finetune",
    )
    protocol: tuple[Literal["full", "running", "strict"], ...] = setting(
        ("strict",),
        "What a merge rule may keep. full: the un-merged models of all tasks. running: the last un-merged model, "
        "where training continues, and the merged one. strict: only the merged model, where the next task "
        "starts (TRM, Fig. 1: A, B, C).",
    )
    init_rule: str | None = setting(
        None,
        "Where training of a task starts for a merge rule: zero-shot (the starting weights) | last (the last un-merged "
        "model) | the merge of the earlier tasks by any rule (TIME).",
        derived="last; with --protocol strict, or where another rule is deployed, the merge by the method's rule",
    )
    deploy_rule: str | None = setting(
        None,
        "What is evaluated and saved after a task: the merge by this rule, or last, the un-merged model (TIME).",
        derived="the method's rule",
    )
    keep_trajectory: bool = setting(
        False,
        "Keep the un-merged model of every task in the run folder (one file per task), so that merge rules named "
        "in a later command need no training. Otherwise they are deleted when the command is done.",
    )
    keep_models: bool = setting(
        False,
        "Keep the model after every task in the folder of its method, models/task-<t>.safetensors; fastmerge.load "
        "and all commands take these files.",
    )
    nearest_mean: bool = setting(
        True,
        "Put nearest-mean into the table, with the first seed: class means of the starting model's features. A method "
        "that ends below it was not worth its training. It costs about a forward pass over all images.",
    )
    seeds: tuple[int, ...] = setting(
        (0,),
        "One run per method and seed.",
        at_least=0,
        largest=2**63 - 1,
    )
    epochs: int = setting(
        15,
        "Training epochs per task.",
        tiny=3,
        at_least=0,
        source="TRM, Implementation Details",
    )
    merge_epochs: int = setting(
        5,
        "Epochs of a method's merge phase.",
        tiny=1,
        at_least=0,
        source="TRM, Implementation Details",
    )
    batch_size: int = setting(
        128,
        "Batch size of training and of the merge phase.",
        unit="images",
        tiny=64,
        at_least=1,
        source="TRM",
    )
    micro_batch: int = setting(
        0,
        "Compute a step in parts of this many images and add their gradients, to need less memory. The result is the "
        "same up to rounding. 0: on a GPU as many as its free memory holds, on a CPU the whole batch.",
        unit="images",
        at_least=0,
    )
    checkpoint_gradients: bool = setting(
        False,
        "Keep only the inputs of the transformer's blocks and run each block again in the backward pass: less memory, a "
        "third more time, the same bits. For training, and the search without the exact curvature.",
    )
    compile: bool | None = setting(
        False,
        "Compile the backbone's forward and backward passes with torch.compile. It takes a minute at the start, and goes "
        "on without where the compiler is missing.",
        derived="on with a GPU, off where gradients are checkpointed",
    )
    precision: Literal["fp32", "tf32", "bf16"] | None = setting(
        "fp32",
        "Precision of matrix products, convolutions and attention in the backbone: training, teacher, evaluation and "
        "Fisher passes. Weights, optimiser, merges, logits and losses are fp32. bf16 is the fastest.",
        derived="bf16 on a GPU that computes in it, else fp32",
    )
    lr: float = setting(
        1e-5,
        "Peak learning rate of AdamW, cosine to zero.",
        tiny=6e-4,
        at_least=0,
        source="TRM",
    )
    lora_rank: int = setting(
        0,
        "Train LoRA of this rank on the key and value projections and fold it into the model after every task; 0 "
        "trains all weights. For the methods with ordinary training; P&M has --pam.rank.",
        at_least=0,
    )
    prompt_length: int = setting(
        0,
        "Train prefix keys and values of this length in every block and nothing else of the backbone; merge rules merge "
        "these prefixes. 0 trains the weights. For the methods that take --lora-rank. Prefixes need a larger rate than "
        "weights: average:prompt_length=8,lr=0.01.",
        unit="tokens",
        at_least=0,
    )
    warmup_steps: int = setting(
        0,
        "Linear warm-up at the start of every task. The released code of MagMax and CMM uses 500, more than most "
        "of their tasks have.",
        unit="steps",
        at_least=0,
    )
    head_lr: float = setting(
        1e-2,
        "Learning rate of a linear head (P&M, Implementation Details).",
        at_least=0,
    )
    weight_decay: float = setting(
        0.1,
        "AdamW weight decay (TRM).",
        at_least=0,
    )
    clip: float = setting(
        1.0,
        "Largest gradient norm; 0 switches clipping off. 1.0 as in the released code of MagMax; the TRM paper "
        "is silent.",
        at_least=0,
    )


@dataclass
class RunSettings:
    device: str = setting(
        "auto",
        "auto (cuda if there is one) | cpu | cuda | cuda:N. Processes with different devices may share a run folder: each "
        "takes the next method and seed that no other one works on.",
    )
    run_dir: str = setting(
        "runs",
        "Results go here; the same command continues a stopped run.",
        derived="runs/<dataset>-<scenario><tasks>-<model>, or runs/<run>-then-<dataset> where it continues another",
    )
    continue_from: str | None = setting(
        None,
        "Add the tasks of this data set to the sequence of a finished run: its folder. The methods go on from what they "
        "kept there, and settings that are not given are those of that run; 1 task unless --tasks says more.",
    )
    sweep: tuple[str, ...] = setting(
        (),
        "Choose settings first: SETTING=VALUE,VALUE,... for one or more settings, such as trm.lambda1=0.01,0.1,1 or "
        "lr=1e-4,1e-3. All combinations are scored on held-out training images (--validation, here 0.2 by default), then the "
        "best is trained on all of them and scored on the test images. The run folder holds both (commands/sweep.py).",
    )
    dry_run: bool = setting(
        False,
        "Check the command, print what it will take, and stop: no training and no run folder.",
    )
    save_every: float = setting(
        60.0,
        "Time between checkpoints; 0 saves after every step. A run that is killed repeats at most this much, or one merge "
        "or evaluation that takes longer.",
        unit="seconds",
        at_least=0,
    )
    wandb: bool = setting(
        False,
        "Also send losses and accuracies to Weights & Biases; needs the package wandb.",
    )
    tensorboard: bool = setting(
        False,
        "Also write losses and accuracies for TensorBoard, into RUN/tensorboard; needs the package tensorboard.",
    )
    quiet: bool = setting(
        False,
        "Print only the final table and errors.",
    )


@dataclass
class Config:
    """All settings of a run, resolved. Without arguments: the values of the papers."""

    data: DataSettings = field(default_factory=DataSettings)
    scenario: ScenarioSettings = field(default_factory=ScenarioSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    run: RunSettings = field(default_factory=RunSettings)
    trm: TRMSettings = field(default_factory=TRMSettings)
    cmm: CMMSettings = field(default_factory=CMMSettings)
    pam: PAMSettings = field(default_factory=PAMSettings)
    became: BecameSettings = field(default_factory=BecameSettings)
    task_arithmetic: TaskArithmeticSettings = field(default_factory=TaskArithmeticSettings)
    ties: TiesSettings = field(default_factory=TiesSettings)
    dare: DareSettings = field(default_factory=DareSettings)
    della: DellaSettings = field(default_factory=DellaSettings)
    magmax: MagMaxSettings = field(default_factory=MagMaxSettings)
    fisher: FisherSettings = field(default_factory=FisherSettings)
    cofima: CofimaSettings = field(default_factory=CofimaSettings)
    coma: ComaSettings = field(default_factory=ComaSettings)
    ema: EMASettings = field(default_factory=EMASettings)
    wise_ft: WiseFTSettings = field(default_factory=WiseFTSettings)
    regmean: RegMeanSettings = field(default_factory=RegMeanSettings)
    iso_c: IsoCSettings = field(default_factory=IsoCSettings)
    tsv: TSVSettings = field(default_factory=TSVSettings)
    opcm: OPCMSettings = field(default_factory=OPCMSettings)
    breadcrumbs: BreadcrumbsSettings = field(default_factory=BreadcrumbsSettings)
    sce: SCESettings = field(default_factory=SCESettings)
    clip_adapter: CLIPAdapterSettings = field(default_factory=CLIPAdapterSettings)
    inflora: InfLoRASettings = field(default_factory=InfLoRASettings)
    sdlora: SDLoRASettings = field(default_factory=SDLoRASettings)
    coop: CoOpSettings = field(default_factory=CoOpSettings)
    vpt: VPTSettings = field(default_factory=VPTSettings)
    maple: MaPLeSettings = field(default_factory=MaPLeSettings)
    attriclip: AttriCLIPSettings = field(default_factory=AttriCLIPSettings)
    ewc: EWCSettings = field(default_factory=EWCSettings)
    lwf: LwFSettings = field(default_factory=LwFSettings)
    ranpac: RanPACSettings = field(default_factory=RanPACSettings)
    icarl: ICaRLSettings = field(default_factory=ICaRLSettings)
    clg_cbm: CLGCBMSettings = field(default_factory=CLGCBMSettings)
    proof: ProofSettings = field(default_factory=ProofSettings)
    rapf: RAPFSettings = field(default_factory=RAPFSettings)
    slca: SLCASettings = field(default_factory=SLCASettings)
    l2p: L2PSettings = field(default_factory=L2PSettings)
    dualprompt: DualPromptSettings = field(default_factory=DualPromptSettings)
    coda: CodaSettings = field(default_factory=CodaSettings)
    hide: HiDeSettings = field(default_factory=HiDeSettings)


PLAIN_GROUPS = ("data", "scenario", "model", "training", "run")  # their flags have no prefix

# These may change between two starts of a run: they choose which results are made, where from and where to, not the
# numbers. What the last eleven name, and what a run goes on from, is compared by its content (identity.py).
FREE = {
    "training.preset",
    "training.method",
    "training.seeds",
    "training.protocol",
    "training.keep_trajectory",
    "training.keep_models",
    "training.nearest_mean",
    "run.run_dir",
    "run.continue_from",
    "run.dry_run",
    "run.sweep",
    "run.save_every",
    "run.quiet",
    "run.wandb",
    "run.tensorboard",
    "data.download",
    "data.cache_gb",
    "data.skip_bad_images",  # it decides whether an unreadable image stops a run, never what is computed
    "run.device",
    "data.data_root",
    "data.split_file",
    "data.test_part",
    "data.retain",
    "data.template",
    "data.class_names",
    "scenario.class_order",
    "model.pretrained",
    "model.mean",
    "model.std",
}


def to_dict(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)
