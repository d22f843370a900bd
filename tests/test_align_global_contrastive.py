"""The global contrastive loss against a slow transcription, over steps, processes and restarts."""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pairs_corpus import SHAPES, TINY_BERT, TINY_VIT, tiny_model, tiny_pretrain
from ranks import run_ranks
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from align.checkpoint import checkpoints
from align.losses import GlobalContrastive, build_loss, global_contrastive
from align.objective import ContrastiveObjective, Pairs, derive
from pipelines import pretrain, run_folder
from pipelines.config import build
from pipelines.schemas import PretrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")

ESTIMATORS = ("image_log_mean", "text_log_mean", "visits")


def unit_rows(rows: int, dim: int, *, seed: int, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=dtype), dim=-1)


def estimators(loss: GlobalContrastive) -> list[Tensor]:
    return [getattr(loss, name).clone() for name in ESTIMATORS]


class Slow:
    """The formulas of the docstring, one number at a time, in float64."""

    def __init__(self, samples: int, *, gamma: float, gamma_visits: int, rho: float, eps: float):
        self.u = np.zeros((2, samples))
        self.visits = [0] * samples
        self.gamma, self.gamma_visits, self.rho, self.eps = gamma, gamma_visits, rho, eps

    def rate(self, visits: int) -> float:
        if visits >= self.gamma_visits:
            return self.gamma
        return self.gamma + (1 - self.gamma) * (
            (1 + math.cos(math.pi * visits / self.gamma_visits)) / 2
        )

    def step(self, image, text, labels, ids, *, tau: float):
        """Loss and gradients of image, text and the logarithm of 1 / tau; learns as it goes."""
        n = len(image)
        d_similarity, d_tau, loss = np.zeros((n, n)), self.rho, self.rho * tau
        for side, similarity in enumerate((image @ text.T, (image @ text.T).T)):
            others = [[j for j in range(n) if labels[j] != labels[i]] for i in range(n)]
            gaps = [[similarity[i, j] - similarity[i, i] for j in others[i]] for i in range(n)]
            g = [float(np.mean(np.exp(np.array(gaps[i]) / tau))) for i in range(n)]
            fresh = {one: np.mean([g[i] for i in range(n) if ids[i] == one]) for one in set(ids)}
            for one, value in fresh.items():
                gamma = self.rate(self.visits[one])
                self.u[side, one] = (1 - gamma) * self.u[side, one] + gamma * value
            for i in range(n):
                inner = self.eps + self.u[side, ids[i]]
                loss += tau * math.log(inner) / (2 * n)
                d_tau += math.log(inner) / (2 * n)
                for j, gap in zip(others[i], gaps[i], strict=True):
                    part = math.exp(gap / tau) / len(others[i]) / inner / (2 * n)
                    where = (i, j) if side == 0 else (j, i)
                    d_similarity[where] += part  # tau of the loss and 1 / tau of the gap
                    d_similarity[i, i] -= part
                    d_tau -= tau * part * gap / tau**2
        for one in set(ids):
            self.visits[one] += 1
        return loss, d_similarity @ text, d_similarity.T @ image, -tau * d_tau


BATCHES = [
    ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]),
    ([5, 6, 7, 8, 0, 1], [5, 6, 5, 8, 0, 1]),  # two samples of one label
    ([2, 2, 0, 9, 3, 4], [2, 2, 0, 9, 3, 9]),  # one sample twice, and two of one label
    ([0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 0]),
    ([9, 8, 7, 0, 1, 2], [9, 8, 7, 0, 1, 2]),
    ([0, 0, 0, 5, 6, 2], [0, 0, 0, 5, 6, 2]),  # one three times
]


@pytest.mark.parametrize("gamma_visits", [1, 3])
def test_equals_the_slow_transcription_over_several_steps(gamma_visits):
    told = {"gamma": 0.3, "gamma_visits": gamma_visits, "rho": 1.7, "eps": 1e-3}
    loss = GlobalContrastive(samples=10, temperature=0.2, **told).double()
    slow = Slow(10, **told)
    for number, (ids, labels) in enumerate(BATCHES):
        image = unit_rows(6, 5, seed=number).requires_grad_()
        text = unit_rows(6, 5, seed=number + 50).requires_grad_()
        value = loss(image, text, torch.tensor(labels), torch.tensor(ids))
        found = torch.autograd.grad(value, [image, text, loss.logit_scale])
        loss.commit()
        temperature = math.exp(-loss.logit_scale.item())
        expected, *gradients = slow.step(
            image.detach().numpy(), text.detach().numpy(), labels, ids, tau=temperature
        )
        assert value.item() == pytest.approx(expected, rel=1e-10)
        for one, other in zip(found, gradients, strict=True):
            np.testing.assert_allclose(one.numpy(), other, rtol=1e-9, atol=1e-12)
        seen = [one for one in range(10) if slow.visits[one]]
        np.testing.assert_allclose(loss.image_log_mean.exp()[seen], slow.u[0, seen], rtol=1e-10)
        np.testing.assert_allclose(loss.text_log_mean.exp()[seen], slow.u[1, seen], rtol=1e-10)
        assert loss.visits.tolist() == slow.visits
        with torch.no_grad():
            loss.logit_scale.add_(0.1)


def test_with_rate_one_the_gradient_is_that_of_the_batch_alone():
    loss = GlobalContrastive(samples=8, temperature=0.1, gamma=1.0, rho=0.5).double()
    loss(unit_rows(8, 5, seed=2), unit_rows(8, 5, seed=3), samples=torch.arange(8))
    loss.commit()  # what it left behind must not matter
    image, text = unit_rows(8, 5, seed=0).requires_grad_(), unit_rows(8, 5, seed=1).requires_grad_()
    value = loss(image, text, samples=torch.arange(8))
    found = torch.autograd.grad(value, [image, text, loss.logit_scale])
    tau = 1 / loss.logit_scale.exp()
    similarity = image @ text.T
    others = ~torch.eye(8, dtype=torch.bool)
    means = [
        ((rows - rows.diagonal()[:, None]) / tau).exp().where(others, 0.0).sum(dim=1) / 7
        for rows in (similarity, similarity.T)
    ]
    whole = tau * sum((mean + 1e-14).log().mean() for mean in means) / 2 + 0.5 * tau
    assert value.item() == pytest.approx(whole.item(), rel=1e-12)
    expected = torch.autograd.grad(whole, [image, text, loss.logit_scale])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_the_moving_averages_approach_the_mean_over_the_whole_data_set():
    image, text = unit_rows(32, 6, seed=0), unit_rows(32, 6, seed=1)

    def errors(gamma: float) -> tuple[float, float]:
        loss = GlobalContrastive(samples=32, temperature=0.5, gamma=gamma).double()
        draw = torch.Generator().manual_seed(2)
        for _ in range(30):
            for ids in torch.randperm(32, generator=draw).split(4):
                loss(image[ids], text[ids], samples=ids)
                loss.commit()
        gaps = (image @ text.T - (image * text).sum(dim=1, keepdim=True)) / 0.5
        truth = (gaps.exp().sum(dim=1) - 1) / 31
        other = (image @ text.T - (image * text).sum(dim=1)) / 0.5
        of_texts = (other.exp().sum(dim=0) - 1) / 31
        return (
            (loss.image_log_mean.exp() / truth - 1).abs().mean().item(),
            (loss.text_log_mean.exp() / of_texts - 1).abs().mean().item(),
        )

    slowly, at_once = errors(0.1), errors(1.0)
    assert max(slowly) < 0.12
    assert min(at_once) > 3 * max(slowly), "three negatives alone tell much less"


def test_only_commit_keeps_what_forward_learnt():
    loss = GlobalContrastive(samples=5)
    image, text = unit_rows(3, 4, seed=0).float(), unit_rows(3, 4, seed=1).float()
    before = estimators(loss)
    first = loss(image, text, samples=torch.tensor([4, 0, 2]))
    loss(image.flip(0), text, samples=torch.tensor([1, 3, 2]))  # a step that is skipped
    assert torch.equal(loss(image, text, samples=torch.tensor([4, 0, 2])), first)
    assert all(map(torch.equal, estimators(loss), before))
    loss.commit()
    assert loss.visits.tolist() == [1, 0, 1, 0, 1]
    after = estimators(loss)
    loss.commit()
    assert all(map(torch.equal, estimators(loss), after))


def test_evaluation_looks_at_the_batch_alone_and_keeps_nothing():
    loss = GlobalContrastive(samples=4, gamma=0.1)
    image, text = unit_rows(4, 4, seed=0).float(), unit_rows(4, 4, seed=1).float()
    fresh = loss(image, text, samples=torch.arange(4)).item()
    loss(text, image.flip(0), samples=torch.arange(4))
    loss.commit()
    before = estimators(loss)
    loss.eval()
    assert loss(image, text).item() == pytest.approx(fresh, rel=1e-6)
    assert loss(image, text, samples=torch.arange(4)).item() == pytest.approx(fresh, rel=1e-6)
    loss.commit()
    assert all(map(torch.equal, estimators(loss), before))


def test_training_without_ids_is_refused():
    loss = GlobalContrastive(samples=4)
    rows = unit_rows(4, 4, seed=0)
    with pytest.raises(ValueError, match="needs the ids of the samples"):
        loss(rows, rows)


def test_saved_and_loaded_it_goes_on_to_the_bit(tmp_path):
    one = GlobalContrastive(samples=9, gamma=0.4, gamma_visits=4)
    batches = [torch.randperm(9, generator=torch.Generator().manual_seed(n))[:6] for n in range(4)]
    rows = [unit_rows(12, 4, seed=n).float().split(6) for n in range(4)]
    for ids, (image, text) in zip(batches[:3], rows[:3], strict=True):
        one(image, text, samples=ids)
        one.commit()
    torch.save(one.state_dict(), tmp_path / "state.pt")
    other = GlobalContrastive(samples=9, gamma=0.4, gamma_visits=4)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    found = [loss(*rows[3], samples=batches[3]) for loss in (one, other)]
    assert torch.equal(*found)
    one.commit()
    other.commit()
    assert all(map(torch.equal, estimators(one), estimators(other)))


def test_the_order_of_the_rows_does_not_matter():
    ids, labels = torch.tensor([3, 1, 3, 0, 2]), torch.tensor([3, 1, 3, 1, 2])
    image, text, order = unit_rows(5, 4, seed=0), unit_rows(5, 4, seed=1), torch.randperm(5)

    def learnt(rows: Tensor) -> list[Tensor]:
        loss = GlobalContrastive(samples=4, gamma=0.5).double()
        loss(image[rows], text[rows], labels[rows], ids[rows])
        loss.commit()
        value = loss(image[rows], text[rows], labels[rows], ids[rows])
        loss.commit()
        return [value.detach(), *estimators(loss)]

    found = learnt(torch.arange(5)), learnt(order)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_rows_without_negatives_count_zero_and_teach_nothing():
    loss = GlobalContrastive(samples=3, temperature=0.1, rho=2.0).double()
    image = unit_rows(3, 4, seed=0).requires_grad_()
    value = loss(image, unit_rows(3, 4, seed=1), torch.tensor([7, 7, 7]), torch.arange(3))
    value.backward()
    loss.commit()
    assert value.item() == pytest.approx(0.2)
    assert image.grad is not None
    assert image.grad.abs().max() == 0
    assert loss.visits.tolist() == [0, 0, 0]


def test_what_is_not_finite_shows():
    loss = GlobalContrastive(samples=3)
    image = unit_rows(3, 4, seed=0)
    image[1] = math.nan
    assert not loss(image, unit_rows(3, 4, seed=1), samples=torch.arange(3)).isfinite()


def test_the_lowest_temperature_is_within_fp32():
    """A pair that lies opposite its text: exp(200) is not, and neither is exp(-200)."""
    loss = GlobalContrastive(samples=4, temperature=0.01, gamma=0.3)
    image = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).requires_grad_()
    text = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    loss(image, text, samples=torch.arange(4))
    loss.commit()
    value = loss(image, text, samples=torch.arange(4))
    (gradient,) = torch.autograd.grad(value, image)
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert loss.image_log_mean[0] == pytest.approx(200 + math.log(2 / 3), abs=1e-3)
    assert 0.5 < gradient[0].abs().max() < 2, "an estimate that overflowed would say nothing"


def test_half_precision_rows_are_computed_in_fp32():
    image, text = unit_rows(16, 8, seed=0).bfloat16(), unit_rows(16, 8, seed=1).bfloat16()
    loss, ids = GlobalContrastive(samples=16, temperature=0.01), torch.arange(16)
    expected = loss(image.float(), text.float(), samples=ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(image, text, samples=ids), expected)


class Largest(TorchDispatchMode):
    """Notes the most numbers that any tensor has."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else [made]:
            if isinstance(one, Tensor):
                self.numbers = max(self.numbers, one.numel())
        return made


def test_slices_give_the_same_and_the_matrix_of_similarities_never_exists(monkeypatch):
    image, text = unit_rows(60, 4, seed=0), unit_rows(60, 4, seed=1)
    ids, labels = torch.arange(60), torch.arange(60) // 2
    found, largest = [], []
    for limit in (2**22, 60 * 7):
        monkeypatch.setattr(global_contrastive, "_NUMBERS_AT_A_TIME", limit)
        loss = GlobalContrastive(samples=60, temperature=0.1).double()
        mine = image.clone().requires_grad_(), text.clone().requires_grad_()
        with Largest() as seen:
            value = loss(*mine, labels, ids)
            value.backward()
        loss.commit()
        found.append([value, mine[0].grad, mine[1].grad, loss.logit_scale.grad, *estimators(loss)])
        largest.append(seen.numbers)
    assert largest == [60 * 60, 60 * 7]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples >= 1, the size of the data set, got 0"),
        ({"gamma": 0.0}, "0 < gamma <= 1, got 0.0"),
        ({"gamma": 1.5}, "0 < gamma <= 1, got 1.5"),
        ({"gamma_visits": 0}, "1 <= gamma_visits <= 255, got 0"),
        ({"gamma_visits": 256}, "1 <= gamma_visits <= 255, got 256"),
        ({"rho": -1.0}, "a finite rho >= 0, got -1.0"),
        ({"eps": 0.0}, "a finite eps > 0, got 0.0"),
        ({"temperature": 0.001}, "min_temperature"),
    ],
)
def test_senseless_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GlobalContrastive(**{"samples": 4, **options})


def test_unknown_options_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no option 'gama'; known: .*gamma, gamma_visits, rho"):
        build_loss("global_contrastive", samples=4, gama=0.5)


# --- with a model: pieces, processes, a run ---


def objective(samples: int = 8) -> ContrastiveObjective:
    model = tiny_model(
        image="timm:vit_tiny_patch16_224", image_options=TINY_VIT, text_options=TINY_BERT
    )
    loss = GlobalContrastive(samples=samples, temperature=0.1, gamma=0.4, gamma_visits=2)
    return ContrastiveObjective(model, loss).double().train()


def pairs(model, step: int) -> Pairs:
    """Eight rows, one of them a sample that comes twice, two of one label."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (8, 3, 32, 32), generator=generator, dtype=torch.uint8)
    tokens = model.tokenize([f"{SHAPES[(at + step) % 8]} {SHAPES[at % 5]}" for at in range(8)])
    samples = torch.tensor([1, 2, 3, 1, 4, 5, 6, 0])
    return Pairs(images, tokens.ids, tokens.mask, samples % 6, samples)


def three_steps(module: ContrastiveObjective, wrapped: Any, share: slice, pieces: int) -> dict:
    """Descend three times; what came of it."""
    learnt = {}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    for step in range(3):
        whole = pairs(module.model, step)
        mine = Pairs(*(getattr(whole, name)[share] for name in Pairs.__dataclass_fields__))
        parts = [mine.piece(number, pieces) for number in range(pieces)]
        derive(module, parts, seeds=list(range(pieces)), wrapped=wrapped)
        gradients = ((name, one.grad) for name, one in module.named_parameters())
        learnt |= {f"{step} {name}": one.clone() for name, one in gradients if one is not None}
        optimizer.step()
        optimizer.zero_grad()
        module.loss.commit()
    return learnt | dict(module.loss.named_buffers())


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, rtol=1e-8, atol=1e-12, msg=name)


@pytest.fixture(scope="module")
def whole() -> dict[str, Tensor]:
    """Three steps of one process with the whole batch."""
    module = objective()
    return three_steps(module, module, slice(None), pieces=1)


def test_pieces_give_the_gradients_and_estimators_of_the_whole_batch(whole):
    module = objective()
    assert_same(three_steps(module, module, slice(None), pieces=4), whole)
    assert whole["visits"].tolist() == [3, 3, 3, 3, 3, 3, 3, 0]


def rank_steps(rank: int, world: int, folder: str) -> None:
    module = objective()
    wrapped = DistributedDataParallel(module)
    assert isinstance(module.loss, GlobalContrastive)
    module.loss.visits[7] = rank  # of a sample that never comes: nobody else may touch it
    found = three_steps(module, wrapped, slice(4 * rank, 4 * rank + 4), pieces=1)
    torch.save(found, Path(folder) / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes_give_those_of_one_and_send_no_estimators(whole, tmp_path):
    run_ranks(rank_steps, 2, str(tmp_path))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["visits"][7] == rank
        found["visits"][7] = 0
        assert_same(found, whole)


def test_a_run_that_was_stopped_goes_on_to_the_bit(data, tmp_path):
    def run(name: str, **changes: Any) -> Path:
        values = tiny_pretrain(
            data,
            tmp_path / name,
            loss={"name": "global_contrastive", "options": {"gamma": 0.5, "gamma_visits": 3}},
            **changes,
        )
        assert pretrain.run(build(PretrainConfig, values, origin="test")) == 0
        return tmp_path / name

    out = run("straight")
    shutil.copytree(out, tmp_path / "stopped")
    shutil.rmtree(checkpoints(tmp_path / "stopped")[-1])
    (tmp_path / "stopped" / "config.yaml").write_text(
        (out / "config.yaml").read_text().replace(str(out), str(tmp_path / "stopped"))
    )
    again = run("stopped", resume=True)
    names = ("objective.safetensors", "average.safetensors", "optimizer.safetensors")
    first, second = (checkpoints(place)[-1] for place in (out, again))
    assert first.name == second.name == "step_000000012"
    for name in names:
        one, other = load_file(first / name), load_file(second / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    losses = [
        [line["loss"] for line in run_folder.read_metrics(place / "metrics.jsonl")]
        for place in (out, again)
    ]
    assert losses[0] == losses[1]
    kept = load_file(first / "objective.safetensors")
    assert kept["loss.visits"].tolist() == [4] * 48  # four epochs
    assert not kept["loss.image_log_mean"].eq(0).any()
    averaged = load_file(first / "average.safetensors")
    assert "module.loss.logit_scale" in averaged
    assert not any(name in key for key in averaged for name in ESTIMATORS)
