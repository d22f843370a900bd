"""Checkpoints: whole or not at all, and training goes on from them as if it had never stopped."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs_corpus import tiny_model
from safetensors.torch import load_file, save_file
from timm.optim._optim_factory import list_optimizers
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from align.checkpoint import _Stored, checkpoints, fault, load_state, save_state
from align.checksums import altered
from align.folders import whole_folder
from align.losses import InfoNCE
from align.objective import ContrastiveObjective, Pairs
from align.optim import build_optimizer, parameter_groups


def content(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def write(folder: Path, text: str) -> None:
    with whole_folder(folder) as beside:
        (beside / "inner").mkdir()
        for name in ("a", "inner/b"):
            (beside / name).write_text(text)


OLD, NEW = ({"a": text, "inner/b": text} for text in ("old", "new"))


class Interrupt(BaseException):
    """As KeyboardInterrupt: nothing that `except Exception` would catch."""


def interrupt_at(monkeypatch, call: int) -> list[int]:
    """Make the n-th call that touches the file system raise instead."""
    calls = [0]

    def wrap(owner, name):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            calls[0] += 1
            if calls[0] == call:
                raise Interrupt
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    for owner, name in (
        *((Path, one) for one in ("mkdir", "write_text", "rename", "exists")),
        *((shutil, one) for one in ("rmtree",)),
    ):
        wrap(owner, name)
    monkeypatch.setattr("os.fsync", interrupting(calls, call))
    return calls


def interrupting(calls: list[int], call: int):
    def fsync(_):
        calls[0] += 1
        if calls[0] == call:
            raise Interrupt

    return fsync


def all_calls() -> int:
    with pytest.MonkeyPatch.context() as patch:
        calls = interrupt_at(patch, -1)
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / "target", "old")
            calls[0] = 0
            write(Path(folder) / "target", "new")
            return calls[0]


def test_at_every_point_a_folder_is_the_old_or_the_new(tmp_path):
    outcomes = set()
    for call in range(1, all_calls() + 1):
        target = tmp_path / str(call) / "target"
        write(target, "old")
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at(patch, call)
            with pytest.raises(Interrupt):
                write(target, "new")
        found = content(target) if target.exists() else None
        assert found in (OLD, NEW), f"call {call} left {found}"
        outcomes.add("old" if found == OLD else "new")
        write(target, "new")
        assert content(target) == NEW
        assert [path.name for path in target.parent.iterdir()] == ["target"]
    assert outcomes == {"old", "new"}, "the points before and behind the rename were both met"


def test_what_a_kill_left_is_no_checkpoint_and_is_cleared_away(tmp_path):
    for name in ("step_000000010", "step_000000020.writing", "step_000000005"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "progress.json").write_text("{}")
    (tmp_path / "checkpoints" / "step_000000030").mkdir()
    found = [path.name for path in checkpoints(tmp_path)]
    assert found == ["step_000000005", "step_000000010"]
    write(tmp_path / "checkpoints" / "step_000000020", "new")
    assert not (tmp_path / "checkpoints" / "step_000000020.writing").exists()


def test_a_folder_that_replaces_a_checkpoint_is_not_listed_twice(tmp_path):
    place = tmp_path / "checkpoints" / "step_000000010"
    for name in (place.name, place.name + ".previous"):
        (place.parent / name).mkdir(parents=True)
        (place.parent / name / "progress.json").write_text("{}")
    assert checkpoints(tmp_path) == [place]


# --- the state of training ---


class Run:
    """A training run in small: the objective on batches that depend on the step alone."""

    def __init__(self, optimizer: str, *, averaged: bool, seed: int = 0) -> None:
        self.objective = ContrastiveObjective(tiny_model(seed=seed), InfoNCE())
        # As in training: kernels are laid out otherwise in memory than safetensors keeps them.
        self.objective.to(memory_format=torch.channels_last)  # pyright: ignore
        options = {"ns_steps": 2} if optimizer == "muon" else {}
        groups = parameter_groups(self.objective, weight_decay=0.1)
        self.optimizer = build_optimizer(optimizer, groups, learning_rate=3e-3, **options)
        average = get_ema_multi_avg_fn(0.5)
        self.average = (
            AveragedModel(self.objective, multi_avg_fn=average, use_buffers=True)
            if averaged
            else None
        )

    def train(self, steps: range) -> list[float]:
        losses = []
        self.objective.train()
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            images = torch.randint(0, 256, (6, 3, 32, 32), generator=generator, dtype=torch.uint8)
            texts = ["red dot", "blue ring", "green bar", "a black cross", "dot", "yellow"]
            tokens = self.objective.model.tokenize(texts[step % 3 :] + texts[: step % 3])
            rows = torch.arange(6)
            output = self.objective(Pairs(images, tokens.ids, tokens.mask, rows, rows))
            output.loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.average is not None:
                self.average.update_parameters(self.objective)
            losses.append(output.loss.item())
        return losses

    def parts(self):
        return {"module": self.objective, "optimizer": self.optimizer, "average": self.average}

    def weights(self) -> dict[str, torch.Tensor]:
        average = {} if self.average is None else self.average.state_dict()
        own = self.objective.state_dict()
        return {**own, **{f"average.{name}": value for name, value in average.items()}}


@pytest.mark.parametrize("averaged", [False, True], ids=["plain", "averaged"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lamb", "adan"])
def test_training_goes_on_bit_for_bit(tmp_path, optimizer, averaged):
    whole = Run(optimizer, averaged=averaged)
    losses = whole.train(range(6))

    first = Run(optimizer, averaged=averaged)
    head = first.train(range(3))
    save_state(tmp_path / "state", **first.parts(), progress={"step": 3, "loader": {"consumed": 9}})
    second = Run(optimizer, averaged=averaged, seed=1)
    progress = load_state(tmp_path / "state", **second.parts())
    assert progress == {"step": 3, "loader": {"consumed": 9}}
    assert head + second.train(range(3, 6)) == losses
    expected = whole.weights()
    found = second.weights()
    assert found.keys() == expected.keys()
    assert not [name for name in found if not torch.equal(found[name], expected[name])]


def test_without_the_moments_training_would_go_on_otherwise(tmp_path):
    """The test above can fail: weights alone are not the state."""
    first = Run("adamw", averaged=False)
    first.train(range(3))
    save_state(tmp_path / "state", **first.parts(), progress={})
    second = Run("adamw", averaged=False, seed=1)
    load_state(tmp_path / "state", **second.parts())
    second.optimizer.state.clear()
    assert first.train(range(3, 6)) != second.train(range(3, 6))


def test_saving_changes_nothing(tmp_path):
    run = Run("muon", averaged=True)
    run.train(range(2))
    before = copy.deepcopy(run.weights())
    save_state(tmp_path / "state", **run.parts(), progress={})
    assert all(torch.equal(before[name], value) for name, value in run.weights().items())
    assert not list((tmp_path / "state").glob("*.pt"))


@pytest.fixture
def saved(tmp_path) -> Path:
    run = Run("adamw", averaged=True)
    run.train(range(1))
    save_state(tmp_path / "state", **run.parts(), progress={"step": 1})
    return tmp_path / "state"


def refused(folder: Path, run: Run) -> str:
    with pytest.raises(ValueError, match="is no checkpoint of this model") as caught:
        load_state(folder, **run.parts())
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


def test_a_checkpoint_of_another_model_is_refused(saved):
    run = Run("adamw", averaged=True)
    run.objective.model.text_projection = torch.nn.Linear(32, 8, bias=False)
    refused(saved, run)


@pytest.mark.parametrize("keep", [0, 0.5])
@pytest.mark.parametrize(
    "name",
    [
        *("objective.safetensors", "average.safetensors"),
        *("optimizer.safetensors", "progress.json"),
    ],
)
def test_a_damaged_checkpoint_is_refused(saved, name, keep):
    data = (saved / name).read_bytes()
    (saved / name).write_bytes(data[: int(len(data) * keep)])
    refused(saved, Run("adamw", averaged=True))
    (saved / name).unlink()
    refused(saved, Run("adamw", averaged=True))


def test_moments_of_another_model_are_refused(saved, tmp_path):
    other = Run("adamw", averaged=True)
    other.objective.extra = torch.nn.Linear(2, 2)
    other.optimizer.add_param_group({"params": list(other.objective.extra.parameters())})
    other.objective.extra.weight.grad = torch.ones(2, 2)
    other.optimizer.step()
    save_state(tmp_path / "other", **other.parts(), progress={})
    shutil.copy(tmp_path / "other" / "optimizer.safetensors", saved / "optimizer.safetensors")
    refused(saved, Run("adamw", averaged=True))


def test_every_file_is_under_a_checksum_and_parts_cover_them(saved):
    names = sorted(path.name for path in saved.iterdir() if path.name != "checksums.json")
    assert len(names) == 5
    assert altered(saved) is None
    for name in names:
        whole = (saved / name).read_bytes()
        (saved / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 4]))
        assert altered(saved) == f"{name}: its bytes have changed since it was written"
        told = [altered(saved, part=part, parts=3) for part in range(3)]
        assert sum(one is not None for one in told) == 1
        (saved / name).write_bytes(whole)
    (saved / names[0]).unlink()
    assert altered(saved) == f"{names[0]} is missing"


# --- every optimiser ---


class Small:
    """A module of two layers and its optimiser, on batches that depend on the step alone."""

    def __init__(self, optimizer: str, *, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        groups = parameter_groups(self.module, weight_decay=0.1)
        self.optimizer = build_optimizer(optimizer, groups, learning_rate=1e-2)

    def train(self, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            self.optimizer.zero_grad()
            self.module(torch.randn(5, 4)).square().mean().backward()
            self.optimizer.step()

    def parts(self):
        return {"module": self.module, "optimizer": self.optimizer, "average": None}

    def kept(self) -> dict[str, Any]:
        """All that its optimiser keeps, by parameter and slot."""
        return {
            f"{slot}/{name}": value
            for name, parameter in self.module.named_parameters()
            for slot, value in self.optimizer.state.get(parameter, {}).items()
        }


REFUSED = {"adahessian", "kron", "kronc", "kronw"}
ON_CUDA_ONLY = ("bnb", "fused")
OPTIMIZERS = [
    one for one in list_optimizers() if one not in REFUSED and not str(one).startswith(ON_CUDA_ONLY)
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimiser_goes_on_bit_for_bit(tmp_path, optimizer):
    straight, first, second = Small(optimizer), Small(optimizer), Small(optimizer, seed=1)
    straight.train(range(5))
    first.train(range(3))
    save_state(tmp_path / "state", **first.parts(), progress={})
    load_state(tmp_path / "state", **second.parts())
    before, after = first.kept(), second.kept()
    assert {key: type(one) for key, one in after.items()} == {
        key: type(one) for key, one in before.items()
    }
    second.train(range(3, 5))
    for name, expected in straight.module.state_dict().items():
        assert torch.equal(second.module.state_dict()[name], expected), name
    for key, expected in straight.kept().items():
        found = second.kept()[key]
        same = torch.equal(found, expected) if torch.is_tensor(found) else found == expected
        assert same, key


@pytest.mark.parametrize("optimizer", sorted(REFUSED))
def test_an_optimiser_that_could_not_go_on_is_refused_before_the_first_step(optimizer):
    with pytest.raises(ValueError, match=rf"optimizer {optimizer} .* choose another") as caught:
        Small(optimizer)
    assert len(str(caught.value).splitlines()) == 1


def test_what_cannot_be_saved_is_told(tmp_path):
    run = Small("sgd")
    weight = run.optimizer.param_groups[0]["params"][0]
    run.optimizer.state[weight]["rows"] = [torch.ones(2)]
    with pytest.raises(ValueError, match=r"SGD keeps a list as rows of 0\.weight"):
        save_state(tmp_path / "state", **run.parts(), progress={})
    assert not (tmp_path / "state").exists()


# --- in shares ---


def in_shares(folder: Path, kind: str, *, of: int) -> dict[str, torch.Tensor]:
    """Rewrite the tensors of a checkpoint as so many processes would, in rows as FSDP2 has them."""
    path = folder / f"{kind}.safetensors"
    tensors = load_file(path)
    path.unlink()
    for rank in range(of):
        mine, rows = {}, {}
        for name, tensor in tensors.items():
            if not tensor.ndim or name.startswith("step/"):
                if rank == 0:
                    mine[name] = tensor
                continue
            size = -(-len(tensor) // of)
            start = min(rank * size, len(tensor))
            if part := len(tensor[start : start + size]):
                mine[name] = tensor[start : start + part].clone()
                rows[name] = [start, len(tensor)]
        name = f"{kind}-{rank + 1:05d}-of-{of:05d}.safetensors"
        save_file(mine, folder / name, metadata={"rows": json.dumps(rows)})
    return tensors


@pytest.mark.parametrize("of", [2, 3, 7])
def test_shares_of_any_number_of_processes_are_read_as_one(saved, of):
    for kind in ("objective", "average", "optimizer"):
        in_shares(saved, kind, of=of)
    assert fault(saved, averaged=True) is None
    run, straight = Run("adamw", averaged=True, seed=1), Run("adamw", averaged=True)
    load_state(saved, **run.parts())
    straight.train(range(1))
    assert run.train(range(1, 4)) == straight.train(range(1, 4))
    found, expected = run.weights(), straight.weights()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


def test_any_rows_are_read_from_shares(saved):
    whole = in_shares(saved, "objective", of=3)
    stored = _Stored(saved, "objective")
    assert stored.shapes == {name: list(tensor.shape) for name, tensor in whole.items()}
    name = next(name for name, tensor in whole.items() if len(tensor.shape) and len(tensor) == 32)
    for start in range(0, 33, 4):
        for stop in range(start, 33, 3):
            assert torch.equal(stored.read(name, start, stop), whole[name][start:stop])


def test_a_share_that_is_missing_is_told(saved):
    in_shares(saved, "objective", of=3)
    middle = saved / "objective-00002-of-00003.safetensors"
    save_file({}, middle)
    assert "rows of " in (fault(saved, averaged=True) or "")
    refused(saved, Run("adamw", averaged=True))
    middle.unlink()
    assert fault(saved, averaged=True) == f"{middle.name} is missing"
