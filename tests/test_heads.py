"""Compare heads with their formulas, written out by hand."""

import pytest
import torch
import torch.nn.functional as F

from fastmerge.errors import UserError
from fastmerge.models import load_backbone, text_embeddings
from fastmerge.models.heads import LinearHead, PrototypeHead, TextHead, build_head
from fastmerge.models.text_embeddings import text_weights

GENERATOR = torch.Generator()


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fastmerge" / "heads"


class Encoder:
    """Counts the prompts it encodes; every prompt has a fixed random row."""

    logit_scale = 10.0

    def __init__(self):
        self.asked = 0

    def encode(self, prompts, *, device, progress):
        self.asked += len(prompts)
        rows = [torch.randn(4, generator=torch.Generator().manual_seed(len(p) * 7 + ord(p[-1]))) for p in prompts]
        return F.normalize(torch.stack(rows), dim=1)


def test_text_weights_by_hand_and_cached(cache):
    encoder, names, templates = Encoder(), ["ant", "bee"], ["a {}", "the {}"]
    weight = text_weights(encoder, names, templates, "k")
    for i, name in enumerate(names):
        rows = Encoder().encode([t.format(name) for t in templates], device="cpu", progress=None)
        torch.testing.assert_close(weight[i], F.normalize(rows.mean(0), dim=0))
    assert encoder.asked == 4 and len(list(cache.iterdir())) == 1
    assert torch.equal(text_weights(encoder, names, templates, "k"), weight) and encoder.asked == 4
    text_weights(encoder, names[:1], templates, "k")  # one class works and makes a new entry
    (plain := cache / "plain").write_text("")
    assert {path.stat().st_mode for path in cache.glob("*.safetensors")} == {plain.stat().st_mode}  # the umask's
    plain.unlink()
    text_weights(encoder, names, templates, "other weights")
    assert encoder.asked == 10 and len(list(cache.iterdir())) == 3
    for file in cache.iterdir():
        file.write_bytes(b"damaged")
    assert torch.equal(text_weights(encoder, names, templates, "k"), weight)


def test_an_unusable_cache_folder_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert text_weights(Encoder(), ["ant"], ["{}"], "k").shape == (1, 4)


def test_a_full_disk_leaves_no_part_of_an_entry(cache, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(text_embeddings, "save_file", full)
    assert text_weights(Encoder(), ["ant"], ["{}"], "k").shape == (1, 4)
    assert list(cache.iterdir()) == []


def test_text_head():
    weight = F.normalize(torch.randn(3, 4), dim=1)
    head, x = TextHead(weight, 50.0), torch.randn(2, 4)
    classes = torch.tensor([2, 0])
    expected = torch.tensor([[50 * torch.dot(f / f.norm(), weight[c]) for c in classes] for f in x])
    torch.testing.assert_close(head(x, classes), expected)
    assert head.trainable() == [] and not head.needs_initial_features and not any(head.parameters())


def test_linear_head_grows_and_keeps():
    head = LinearHead(4, 6)
    head.grow([5, 2], GENERATOR)
    with torch.no_grad():
        head.weight.copy_(torch.arange(8.0).view(2, 4))
        head.bias.copy_(torch.tensor([1.0, -1.0]))
    head.grow([2, 0], GENERATOR)  # 2 is known, 0 is new
    x = torch.randn(3, 4)
    logits = head(x, torch.tensor([2, 5, 0, 1]))
    torch.testing.assert_close(logits[:, 0], x @ torch.arange(4.0, 8.0) - 1)
    torch.testing.assert_close(logits[:, 1], x @ torch.arange(4.0) + 1)
    assert not logits[:, 2].any() and torch.isneginf(logits[:, 3]).all()
    assert [tuple(p.shape) for p in head.trainable()] == [(3, 4), (3,)]
    fresh = LinearHead(4, 6)
    fresh.load_state_dict(head.state_dict())
    assert torch.equal(fresh(x, torch.tensor([2, 5, 0])), head(x, torch.tensor([2, 5, 0])))


def test_prototypes_are_means_of_normalised_features():
    head, x = PrototypeHead(4, 3, scale=20.0), torch.randn(6, 4)
    labels = torch.tensor([0, 2, 0, 2, 2, 0])
    head.observe(x[:3], labels[:3])
    head.observe(x[3:], labels[3:])  # in another domain, say
    q = torch.randn(2, 4)
    for column, c in enumerate((2, 0)):
        mean = torch.stack([f / f.norm() for f, y in zip(x, labels, strict=True) if y == c]).mean(0)
        expected = 20 * F.cosine_similarity(q, mean[None])
        torch.testing.assert_close(head(q, torch.tensor([2, 0]))[:, column], expected)
    assert torch.isneginf(head(q, torch.tensor([1]))).all() and head.needs_initial_features
    fresh = PrototypeHead(4, 3, scale=20.0)
    fresh.load_state_dict(head.state_dict())
    assert torch.equal(fresh(q, torch.tensor([0])), head(q, torch.tensor([0])))


def test_build_head(cache):
    backbone, encoder = load_backbone("tiny", "none")
    about = {"backbone": backbone, "class_names": ["ant", "bee"], "templates": ["a {}"]}
    head = build_head("text", encoder=encoder, **about)
    torch.testing.assert_close(head.weight, encoder.encode(["a ant", "a bee"]))
    assert float(head.scale) == pytest.approx(encoder.logit_scale)
    assert build_head("linear", encoder=None, **about).kind == "linear"
    assert build_head("prototype", encoder=None, **about).kind == "prototype"
    with pytest.raises(UserError, match="no text tower.*prototype"):
        build_head("text", encoder=None, **about)
    with pytest.raises(UserError, match="unknown head 'prototypes'. Did you mean: prototype"):
        build_head("prototypes", encoder=encoder, **about)


def test_prompts_are_encoded_in_batches_and_progress_is_told(cache):
    encoder, seen = load_backbone("tiny", "none")[1], []
    prompts = ["a", "bee", "some text", "d", "e"]
    together = encoder.encode(prompts)
    rows = encoder.encode(prompts, 2, progress=lambda *x: seen.append(x))
    torch.testing.assert_close(rows, together)
    assert seen == [(2, 5), (4, 5), (5, 5)] and not rows.requires_grad and rows.dtype == torch.float32
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(5))
