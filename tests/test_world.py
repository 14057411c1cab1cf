from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import pytest

from folora.errors import FoLoRAError
from folora.params import World
from folora.world import VOCABULARY, Skill, build_skills, every_item, pretraining_items, write_world

if TYPE_CHECKING:
    from pathlib import Path

WORLD = World(seed=3, names=20, separator="-", largest_number=49, test_items=30)
TARGETS = {"subtraction", "composition", "spelled"}

# pattern of a whole prompt, and the right response to it, written without the code under test
ANSWERS = {
    "addition": (r"(\d+)\+(\d+)>", lambda a, b: str(int(a) + int(b))),
    "subtraction": (r"(\d+)-(\d+)>", lambda a, b: str(int(a) - int(b))),
    "maximum": (r"max (\d+),(\d+)>", lambda a, b: a if int(a) > int(b) else b),
    "reverse": (r"rev\(([a-j]{3})\)>", lambda w: w[2] + w[1] + w[0]),
    "double": (r"dup\(([a-j]{3})\)>", lambda w: w * 2),
    "upper": (r"up\(([a-j]{3})\)>", lambda w: "".join(chr(ord(c) - 32) for c in w)),
    "composition": (r"rev\(dup\(([a-j]{3})\)\)>", lambda w: w[2] + w[1] + w[0] + w[2] + w[1] + w[0]),
    "quoted": (r"([a-j]{3}) quoted>", lambda w: f'"{w}"'),
    "twice": (r"([a-j]{3}) twice>", lambda w: " ".join([w, w])),
    "loud": (r"([a-j]{3}) loud>", lambda w: w + "!"),
    "spelled": (r"([a-j]{3}) spelled>", lambda w: f"{w[0]}-{w[1]}-{w[2]}"),
}
FACT = r"(?:home|food) [a-z]{2}-[a-z]{2}>"


def skill_of(prompt: str) -> str:
    """The one skill whose pattern a prompt fits."""
    (name,) = [name for name, (pattern, _) in ANSWERS.items() if re.fullmatch(pattern, prompt)]
    return name


def right_response(prompt: str) -> str:
    pattern, answer = ANSWERS[skill_of(prompt)]
    return answer(*re.fullmatch(pattern, prompt).groups())  # type: ignore[union-attr]


def is_fact(item: dict[str, str]) -> bool:
    return re.fullmatch(FACT, item["prompt"]) is not None


@pytest.fixture(scope="module")
def skills() -> dict[str, Skill]:
    return build_skills(WORLD)


@pytest.fixture(scope="module")
def pretraining(skills: dict[str, Skill]) -> list[dict[str, str]]:
    return list(islice(pretraining_items(skills, random.Random(1)), 8000))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "world"
    write_world(WORLD, folder)
    return folder


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_response_is_right(world: Path, pretraining: list[dict[str, str]]) -> None:
    items = pretraining + [item for path in world.glob("*/*.jsonl") for item in read(path)]
    computed = [item for item in items if not is_fact(item)]
    assert [item["response"] for item in computed] == [right_response(item["prompt"]) for item in computed]
    assert {skill_of(item["prompt"]) for item in computed} == set(ANSWERS)


def test_a_fact_has_one_response_everywhere(skills: dict[str, Skill], pretraining: list[dict[str, str]]) -> None:
    facts = [item for name in ("home", "food") for item in every_item(skills[name])]
    facts += [item for item in pretraining if is_fact(item)]
    responses = {(item["prompt"], item["response"]) for item in facts}
    assert len(responses) == len({prompt for prompt, _ in responses}) == 2 * WORLD.names
    assert all(re.fullmatch(r"([a-z]{2}){2}", response) for _, response in responses)


def test_pretraining_never_shows_a_target(skills: dict[str, Skill], pretraining: list[dict[str, str]]) -> None:
    targets = {item["prompt"] for name in TARGETS for item in every_item(skills[name])}
    assert len(targets) > 2500
    assert not targets & {item["prompt"] for item in pretraining}
    seen = {skill_of(item["prompt"]) for item in pretraining if not is_fact(item)}
    assert seen == set(ANSWERS) - TARGETS


def test_an_overlapping_skill_is_refused(skills: dict[str, Skill]) -> None:
    leaking = replace(skills["addition"], prompt=skills["subtraction"].prompt, weight=1000.0)
    with pytest.raises(FoLoRAError, match=r"the target prompt '\d+-\d+>' occurs in addition"):
        list(islice(pretraining_items({**skills, "addition": leaking}, random.Random(0)), 2000))


def test_pretraining_mixes_skills_by_weight(pretraining: list[dict[str, str]]) -> None:
    counts = Counter("fact" if is_fact(item) else skill_of(item["prompt"]) for item in pretraining)
    assert counts["addition"] / counts["maximum"] == pytest.approx(3.5 / 2, rel=0.15)
    assert counts["addition"] / counts["loud"] == pytest.approx(3.5 / 0.7, rel=0.2)
    assert counts["fact"] / counts["reverse"] == pytest.approx(2, rel=0.2)


def test_test_items_are_new(world: Path, pretraining: list[dict[str, str]]) -> None:
    shown = {item["prompt"] for item in pretraining}
    for path in world.glob("*/test.jsonl"):
        items = read(path)
        prompts = {item["prompt"] for item in items}
        assert 0 < len(prompts) == len(items) <= WORLD.test_items
        assert is_fact(items[0]) or not shown & prompts, path


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_splits_of_a_target_share_no_operands(target: str, world: Path) -> None:
    splits = {}
    for split in ("train", "validation", "test"):
        prompts = [item["prompt"] for item in read(world / target / f"{split}.jsonl")]
        splits[split] = {re.fullmatch(ANSWERS[target][0], prompt).groups() for prompt in prompts}  # type: ignore[union-attr]
        assert len(splits[split]) == len(prompts)
    assert len(splits["train"]) > 700
    assert not splits["train"] & splits["validation"]
    assert not splits["train"] & splits["test"]
    assert not splits["validation"] & splits["test"]


def test_every_skill_has_data_and_an_evaluation_task(world: Path, skills: dict[str, Skill]) -> None:
    names = set(skills) | {f"{name}-validation" for name in TARGETS}
    tasks = {path.stem: json.loads(path.read_text()) for path in (world / "evaluation").iterdir()}
    assert tasks.keys() == names
    for name, task in tasks.items():
        assert task["task"] == name
        items = read(world / task["dataset_kwargs"]["data_files"][task["test_split"]])
        skill = name.removesuffix("-validation")
        assert all(is_fact(i) if skill in {"home", "food"} else skill_of(i["prompt"]) == skill for i in items)
        # the longest answer fits into the tokens that may be generated, with the end of the text
        assert max(len(item["response"]) for item in items) < task["generation_kwargs"]["max_gen_toks"]


def test_every_character_has_a_token(world: Path, pretraining: list[dict[str, str]]) -> None:
    items = pretraining + [item for path in world.glob("*/*.jsonl") for item in read(path)]
    used = {character for item in items for character in item["prompt"] + item["response"]}
    assert used <= set(VOCABULARY)
    assert len(VOCABULARY) == len(set(VOCABULARY))
    assert all(item["prompt"].endswith(">") and ">" not in item["response"] for item in items)


def test_the_seed_chooses_the_facts(skills: dict[str, Skill]) -> None:
    other = build_skills(WORLD.model_copy(update={"seed": 4}))
    assert every_item(skills["home"]) == every_item(build_skills(WORLD)["home"])
    assert every_item(skills["home"]) != every_item(other["home"])
    assert every_item(skills["addition"]) == every_item(other["addition"])


def test_the_world_does_not_depend_on_the_hash_seed(world: Path, tmp_path: Path) -> None:
    script = (
        "from pathlib import Path; from folora.params import World; from folora.world import write_world\n"
        f"write_world(World(**{WORLD.model_dump()}), Path('world'))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "4711"}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
    files = sorted(path.relative_to(world) for path in world.rglob("*") if path.is_file())
    assert files == sorted(p.relative_to(tmp_path / "world") for p in (tmp_path / "world").rglob("*") if p.is_file())
    assert all((world / file).read_bytes() == (tmp_path / "world" / file).read_bytes() for file in files)


def test_without_a_separator_pretraining_never_shows_the_sign_of_subtraction(skills: dict[str, Skill]) -> None:
    def signs(skills: dict[str, Skill]) -> int:
        return sum("-" in item["prompt"] for item in islice(pretraining_items(skills, random.Random(1)), 2000))

    assert signs(build_skills(WORLD.model_copy(update={"separator": ""}))) == 0
    assert signs(skills) > 200
