"""The README tells the truth: its tree is the real one, its commands are commands."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from pipelines.cli import VERBS, parse

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGES = ("align", "shards", "eval", "pipelines", "benchmarks")


def tree() -> str:
    """Every module with the first line of its docstring; running this file prints it."""
    lines: list[str] = []
    for package in PACKAGES:
        lines.append(f"{package}/")
        for path in sorted((ROOT / package).rglob("*.py")):
            inside = path.relative_to(ROOT / package).as_posix()
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            assert docstring, f"{path} says nothing of itself"
            lines.append(f"  {inside:<24} {docstring.splitlines()[0]}".rstrip())
    return "\n".join(lines)


def test_the_tree_is_the_real_one():
    assert tree() in README, f"put this tree into README.md:\n\n{tree()}"


def test_nothing_is_left_to_be_filled_in():
    assert "@@" not in README


def commands() -> list[str]:
    blocks = re.findall(r"(?m)^    (align .+)$", README)
    return [block.split("  #")[0].strip() for block in blocks]


def test_the_readme_shows_commands():
    assert len(commands()) >= 6


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_readme_is_understood(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evaluate.yaml").write_text(
        "model: bundle\ntasks: {names: {task: retrieval, data: shards}}\n"
    )
    _, verb, *arguments = shlex.split(command)
    assert verb in VERBS
    parse(verb, arguments)


def test_the_five_lines_rank_texts_for_pictures(tmp_path, monkeypatch, capsys):
    from pairs_corpus import picture, tiny_model

    import align

    (block,) = re.findall(r"(?s)```python\n(.+?)```", README)
    assert len([line for line in block.splitlines() if line]) == 5
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    align.save(model, re.findall(r'load\("(.+?)"\)', block)[0])
    drawn = {"cat.png": picture("red", "ring"), "heart.png": picture("blue", "dot")}
    for name, image in drawn.items():
        image.save(tmp_path / name)
    exec(block, {})
    similar = (
        model.encode_image(list(drawn.values())) @ model.encode_text(["cat face", "red heart"]).T
    )
    assert capsys.readouterr().out == f"{similar.argsort(descending=True)}\n"


def test_the_python_face_is_small():
    import align

    assert len(align.__all__) <= 10
    assert all(getattr(align, name) for name in align.__all__)


if __name__ == "__main__":
    print(tree())
