"""The embedded backbone. Oracles: open_clip's text pooling for the tokens, the bytes of the text, recorded accuracies
(scripts/pretrain_tiny.py) with a margin for rounding."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastmerge.data import glyphs
from fastmerge.models import tiny


def normalise(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in (tiny.IMAGE_MEAN, tiny.IMAGE_STD))
    return (images.float() / 255 - mean) / std


def accuracy(model, images, labels, names) -> float:
    """Return the zero-shot accuracy with one template."""
    text = torch.cat(
        [model.encode_text(tiny.tokenize(names[i : i + 128]), normalize=True) for i in range(0, len(names), 128)]
    )
    return (model.encode_image(normalise(images)) @ text.T).argmax(1).eq(torch.as_tensor(labels)).float().mean().item()


@pytest.fixture(scope="module")
def model():
    return tiny.load_tiny()


def test_tokens_are_start_bytes_end():
    tokens = tiny.tokenize(["", "ab", "é"])
    assert tokens.shape == (3, 77) and tokens.dtype == torch.int64
    assert tokens[0, :3].tolist() == [256, 257, 0]
    assert tokens[1, :5].tolist() == [256, 97, 98, 257, 0]
    assert tokens[2, :5].tolist() == [256, *"é".encode(), 257, 0]
    assert tokens.argmax(1).tolist() == [1, 3, 3]  # where open_clip pools


def test_a_long_text_is_cut_and_keeps_its_end():
    tokens = tiny.tokenize(["x" * 75, "x" * 76, "x" * 500])
    assert torch.equal(tokens[0], tokens[1]) and torch.equal(tokens[0], tokens[2])
    assert tokens.argmax(1).tolist() == [76, 76, 76]


def test_no_prompt_of_the_glyphs_is_cut():
    longest = max(len(t.format(name)) for t in glyphs.TEMPLATES for _, name in glyphs.characters())
    assert longest <= tiny.CONTEXT - 2


def test_padding_after_the_end_means_nothing(model):
    tokens = tiny.tokenize(["latin small letter a"])
    noisy = tokens.clone()
    noisy[0, 30:] = 7
    with torch.no_grad():
        assert torch.equal(model.encode_text(tokens), model.encode_text(noisy))


def test_assets_are_small():
    total = sum(f.stat().st_size for folder in (glyphs.ASSETS, tiny.WEIGHTS.parent) for f in folder.iterdir())
    assert total <= 8 * 2**20
    assert all(tensor.dtype == torch.float16 for tensor in load_file(tiny.WEIGHTS).values())


def test_create_is_a_function_of_the_seed():
    def digest(seed: int) -> str:
        torch.manual_seed(seed)
        state = tiny.create_tiny().state_dict()
        return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in state.values())).hexdigest()

    assert digest(0) == digest(0) != digest(1)


def test_load_is_fp32_in_eval_mode_and_leaves_the_generator_alone(model):
    assert not model.training
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tiny.load_tiny()
    assert torch.equal(torch.rand(3), expected)


@torch.no_grad()
def test_zero_shot(model):
    device = torch.device("cpu")
    rows = np.array(glyphs.pretraining_rows())
    names = [glyphs.characters()[row][1] for row in rows]
    labels = np.random.RandomState(11).randint(len(rows), size=600)
    cells = rows[labels] * 12 + np.arange(600) % 12
    seen = accuracy(model, glyphs.render(cells, glyphs.uniforms(11, np.arange(600)), device), labels, names)
    assert seen > 0.70
    run = glyphs.load(test_per_face=1)
    images, _ = run.test.read(np.arange(len(run.test)), 32, device)
    unseen = accuracy(model, images, run.test.labels, list(run.class_names))
    assert 0.45 < unseen < 0.6  # characters that pre-training did not see
    text = model.encode_text(tiny.tokenize(list(run.class_names)), normalize=True)
    assert (text @ text.T - torch.eye(50)).max() < 0.999  # the text tower separates all names of the default run
