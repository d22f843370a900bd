"""Laws that every registered fusion head keeps."""

from typing import get_args

import pytest
import torch
from safetensors.torch import load, save
from torch.nn import functional as F

from align.fusion import FUSION_HEADS, fusion_head
from align.fusion.head import Family, FusionHead, Modality
from align.fusion.training import ComposedQueries, FeatureBank, composed_loss, fuse_all, train_head

DIM, IMAGE_WIDTH, TEXT_WIDTH = 16, 24, 12
every_head = pytest.mark.parametrize("name", FUSION_HEADS)


def make(name: str, *, stirred=True, **widths: int) -> FusionHead:
    """A head; stirred, so that what starts at zero has something to say."""
    torch.manual_seed(0)
    sizes = {"dim": DIM, "image_width": IMAGE_WIDTH, "text_width": TEXT_WIDTH, **widths}
    head = fusion_head(name)(**sizes)
    if stirred:
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return head.eval()


def pair(rows: int, *, seed=0, dim=DIM, image_width=IMAGE_WIDTH, text_width=TEXT_WIDTH):
    generator = torch.Generator().manual_seed(seed)

    def modality(tokens: int, width: int) -> Modality:
        mask = torch.rand(rows, tokens, generator=generator) < 0.7
        mask[:, 0] = True
        return Modality(
            F.normalize(torch.randn(rows, dim, generator=generator), dim=-1),
            torch.randn(rows, tokens, width, generator=generator),
            mask,
            torch.ones(rows, dtype=torch.bool),
        )

    return modality(5, image_width), modality(7, text_width)


def changed(modality: Modality, **fields) -> Modality:
    values = {**vars(modality), **fields}
    return Modality(**{key: value.clone() for key, value in values.items()})


@every_head
def test_a_head_declares_itself(name):
    head = fusion_head(name)
    assert head.family in get_args(Family)
    assert head.needs in ("pooled", "tokens")
    assert head.__doc__


@every_head
def test_rows_are_independent_also_in_training(name):
    head = make(name).train()
    image, text = pair(4)
    for tensor in (image.pooled, image.tokens, text.pooled, text.tokens):
        assert tensor is not None
        tensor.requires_grad_()
    head(image, text).embedding[1].sum().backward()
    for tensor in (image.pooled, image.tokens, text.pooled, text.tokens):
        assert tensor is not None
        if tensor.grad is not None:
            others = tensor.grad[[0, 2, 3]]
            assert torch.equal(others, torch.zeros_like(others))
    assert image.pooled.grad is not None
    assert image.pooled.grad[1].abs().sum() > 0


@every_head
def test_a_batch_of_one_equals_its_row_in_a_larger_batch(name):
    head = make(name)
    image, text = pair(6)
    whole = head(image, text).embedding
    one = [Modality(*(value[2:3] for value in vars(part).values())) for part in (image, text)]
    torch.testing.assert_close(head(*one).embedding, whole[2:3], rtol=1e-5, atol=1e-6)


@every_head
def test_padding_is_invisible(name):
    head = make(name)
    image, text = pair(6)
    expected = head(image, text).embedding
    for part in (image, text):
        assert part.tokens is not None
        assert part.mask is not None
        part.tokens[~part.mask] = float("nan")
    assert torch.equal(head(image, text).embedding, expected)


@every_head
def test_absence_is_invisible_and_one_modality_passes_unchanged(name):
    head = make(name).train()
    image, text = pair(6)
    there = torch.tensor([True, False, True, True, False, True])
    text_there = torch.tensor([True, True, False, True, True, False])
    image, text = changed(image, present=there), changed(text, present=text_there)
    expected = head(image, text).embedding
    for part, present in ((image, there), (text, text_there)):
        assert part.tokens is not None
        part.pooled[~present] = float("nan")
        part.tokens[~present] = float("nan")
    found = head(image, text).embedding
    assert torch.equal(found, expected)
    torch.testing.assert_close(found[~text_there], image.pooled[~text_there])
    torch.testing.assert_close(found[~there], text.pooled[~there])
    found.sum().backward()
    for parameter in head.parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()


@every_head
def test_a_row_without_either_modality_is_named(name):
    image, text = pair(3)
    nothing = torch.tensor([True, True, False])
    with pytest.raises(ValueError, match="row 2 has neither"):
        make(name)(changed(image, present=nothing), changed(text, present=nothing))


@every_head
def test_no_dead_weight(name):
    head = make(name, stirred=False).train()
    before = {key: value.clone() for key, value in head.state_dict().items()}
    assert {key for key, _ in head.named_parameters()} <= set(before)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    for seed in range(3):
        image, text = pair(8, seed=seed)
        target = F.normalize(torch.randn(8, DIM), dim=-1)
        optimizer.zero_grad()
        (head(image, text).embedding - target).square().sum().backward()
        optimizer.step()
    for key, parameter in head.named_parameters():
        assert not torch.equal(parameter, before[key]), f"{key} never moved"


@every_head
def test_both_modalities_matter(name):
    head = make(name)
    image, text = pair(4)
    image.pooled.requires_grad_()
    text.pooled.requires_grad_()
    head(image, text).embedding[:, 0].sum().backward()
    for part in (image, text):
        assert part.pooled.grad is not None
        assert (part.pooled.grad.abs().sum(dim=1) > 0).all()


@every_head
def test_evaluation_is_deterministic_and_survives_saving(name):
    head = make(name)
    image, text = pair(4)
    expected = head(image, text).embedding
    assert torch.equal(head(image, text).embedding, expected)
    other = make(name, stirred=False)
    other.load_state_dict(load(save(head.state_dict())))
    assert torch.equal(other(image, text).embedding, expected)


@every_head
def test_it_starts_at_the_mean(name):
    image, text = pair(8)
    mean = F.normalize(image.pooled + text.pooled, dim=-1)
    torch.testing.assert_close(make(name, stirred=False)(image, text).embedding, mean)


@every_head
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unit_length_fp32_at_the_widths_of_resnet50_and_bert(name, dtype):
    widths = {"dim": 512, "image_width": 2048, "text_width": 768}
    image, text = pair(3, **widths)
    assert image.tokens is not None
    image = changed(image, tokens=image.tokens.to(dtype), pooled=image.pooled.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        embedding = make(name, stirred=True, **widths)(image, text).embedding
    assert embedding.dtype == torch.float32
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(3))


@every_head
def test_training_learns_what_the_mean_cannot(name):
    """The answer is the picture itself, moved along a fixed direction that the words choose."""
    generator = torch.Generator().manual_seed(5)
    pictures = F.normalize(torch.randn(60, DIM, generator=generator), dim=-1)
    words = F.normalize(torch.randn(1, DIM, generator=generator), dim=-1)
    bank = FeatureBank(
        torch.cat([pictures, F.normalize(pictures - 0.8 * words, dim=-1)]),
        torch.randn(120, 3, IMAGE_WIDTH, generator=generator),
        torch.ones(120, 3, dtype=torch.bool),
    )
    texts = FeatureBank(words, torch.zeros(1, 2, TEXT_WIDTH), torch.ones(1, 2, dtype=torch.bool))
    queries = ComposedQueries(
        picture=torch.arange(60),
        text=torch.zeros(60, dtype=torch.long),
        reference=torch.arange(60),
        target=torch.arange(60, 120),
    )
    head = make(name, stirred=False)
    losses = train_head(
        head,
        queries,
        pictures=bank,
        texts=texts,
        candidates=bank.pooled,
        groups=torch.zeros(120, dtype=torch.long),
        steps=60,
        batch_size=32,
        learning_rate=1e-2,
        weight_decay=0.0,
        temperature=0.1,
        seed=0,
    )
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert not head.training
    fused = fuse_all(head, queries, pictures=bank, texts=texts, batch_size=7)
    assert fused.shape == (60, DIM)


def test_the_loss_leaves_out_what_is_not_allowed():
    candidates = torch.eye(4)
    query = F.normalize(torch.tensor([[1.0, 0.9, 0.0, 0.0]]), dim=-1)
    allowed = torch.tensor([[False, True, True, False]])
    loss = composed_loss(
        query, candidates, target=torch.tensor([1]), allowed=allowed, temperature=0.1
    )
    scores = torch.tensor([query[0, 1].item(), 0.0]) / 0.1
    assert loss.item() == pytest.approx((scores.logsumexp(0) - scores[0]).item(), abs=1e-6)


def test_a_head_of_another_package_goes_by_its_path():
    assert fusion_head("align.fusion.early:Early") is fusion_head("early")


@pytest.mark.parametrize("name", ["erly", "no.such.module:Head", "align.fusion.early:Erly"])
def test_unknown_heads_list_the_known(name):
    with pytest.raises(ValueError, match=r"known: early, intermediate, late"):
        fusion_head(name)


class AcrossTheBatch(fusion_head("early")):
    """Broken on purpose: a row sees the mean of the batch."""

    def mix(self, image, text):
        fused = super().mix(image, text)
        return type(fused)(fused.embedding + fused.embedding.mean(dim=0))


class ForgottenFactors(fusion_head("early")):
    """Broken on purpose: weights in a plain list, as the most copied low-rank fusion has them."""

    def __init__(self, **widths):
        super().__init__(**widths)
        self.factors = [torch.nn.Linear(2 * DIM, DIM)]

    def mix(self, image, text):
        fused = super().mix(image, text)
        both = torch.cat([image.pooled, text.pooled], dim=-1)
        return type(fused)(fused.embedding + self.factors[0](both))


def test_the_laws_catch_a_head_that_mixes_rows(monkeypatch):
    monkeypatch.setitem(FUSION_HEADS, "broken", f"{__name__}:AcrossTheBatch")
    with pytest.raises(AssertionError):
        test_rows_are_independent_also_in_training("broken")


def test_the_laws_catch_weights_outside_the_state(monkeypatch):
    monkeypatch.setitem(FUSION_HEADS, "broken", f"{__name__}:ForgottenFactors")
    with pytest.raises(AssertionError):
        test_it_starts_at_the_mean("broken")
