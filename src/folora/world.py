"""The synthetic world of the offline preset: ten skills the foundation learns, three targets it has never seen.

The three families follow the three adaptations of the paper (mathematics, code, instruction following). A document
is ``prompt + response``; every prompt ends in ``>``. A skill splits its items by operand, so that no test operand is
ever trained on; facts are the exception, since a fact can only be recalled.
"""

from __future__ import annotations

import hashlib
import json
import random
import string
from dataclasses import dataclass
from typing import TYPE_CHECKING

from folora.errors import FoLoRAError
from folora.storage import publish, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from folora.params import World

Operands = tuple[str, ...]

LETTERS = "abcdefghij"
VOCABULARY = string.digits + string.ascii_lowercase + LETTERS.upper() + ' +-(),"!>'
LONGEST_ANSWER = 8  # tokens: "abc abc" and EOS
ALL_ITEMS = 10_000  # more than any target has in a split
SPLIT_BUCKETS = {"test": {0}, "validation": {1}, "train": {2, 3, 4, 5, 6, 7}}


@dataclass(frozen=True)
class Skill:
    """One skill: how its operands are drawn, asked about and answered.

    Attributes:
        name: unique name, also the name of its evaluation task.
        family: ``mathematics``, ``code`` or ``instruction``.
        draw: random generator to operands.
        prompt: operands to the text the model is given.
        response: operands to the only right answer.
        weight: share of the pretraining mixture; 0 for a target, which pretraining never shows.
        recall: true for facts, whose items are the same in every split.
    """

    name: str
    family: str
    draw: Callable[[random.Random], Operands]
    prompt: Callable[..., str]
    response: Callable[..., str]
    weight: float = 1.0
    recall: bool = False

    @property
    def is_target(self) -> bool:
        return self.weight == 0

    def item(self, operands: Operands) -> dict[str, str]:
        """The row ``{"prompt", "response"}`` of these operands."""
        return {"prompt": self.prompt(*operands), "response": self.response(*operands)}

    def split_of(self, operands: Operands) -> str:
        """The split these operands belong to: a stable hash, the same in every process."""
        digest = hashlib.sha256("\0".join((self.name, *operands)).encode()).digest()
        bucket = digest[0] % 8
        return next(split for split, buckets in SPLIT_BUCKETS.items() if bucket in buckets)

    def draw_from(self, split: str, generator: random.Random) -> Operands:
        """Draw operands that belong to ``split``."""
        while True:
            operands = self.draw(generator)
            if self.recall or self.split_of(operands) == split:
                return operands

    def distinct_items(self, split: str, count: int, generator: random.Random) -> list[dict[str, str]]:
        """Up to ``count`` distinct items of a split; fewer where the skill has no more of them."""
        seen: dict[Operands, None] = {}
        fruitless = 0
        while len(seen) < count and fruitless < 5_000:
            before = len(seen)
            seen.setdefault(self.draw_from(split, generator))
            fruitless = 0 if len(seen) > before else fruitless + 1
        return [self.item(operands) for operands in seen]


def _fact_tables(world: World, generator: random.Random) -> tuple[list[str], dict[str, str], dict[str, str]]:
    syllables = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]
    pairs = [f"{first}{world.separator}{second}" for first in syllables for second in syllables if first != second]
    keys = generator.sample(pairs, world.names)
    homes = {key: "".join(generator.sample(syllables, 2)) for key in keys}
    foods = {key: "".join(generator.sample(syllables, 2)) for key in keys}
    return keys, homes, foods


def build_skills(world: World) -> dict[str, Skill]:
    """All thirteen skills of one world, by name; ``world.seed`` chooses the fact tables."""
    keys, homes, foods = _fact_tables(world, random.Random(world.seed))

    def name(generator: random.Random) -> Operands:
        return (generator.choice(keys),)

    def numbers(generator: random.Random) -> Operands:
        return (str(generator.randint(0, world.largest_number)), str(generator.randint(0, world.largest_number)))

    def ordered_numbers(generator: random.Random) -> Operands:
        low, high = sorted((generator.randint(0, world.largest_number), generator.randint(0, world.largest_number)))
        return (str(high), str(low))

    def word(generator: random.Random) -> Operands:
        return ("".join(generator.choices(LETTERS, k=3)),)

    skills = [
        Skill("home", "mathematics", name, "home {}>".format, lambda key: homes[key], recall=True),
        Skill("food", "mathematics", name, "food {}>".format, lambda key: foods[key], recall=True),
        Skill("addition", "mathematics", numbers, "{}+{}>".format, lambda a, b: str(int(a) + int(b)), weight=3.5),
        Skill(
            "maximum", "mathematics", numbers, "max {},{}>".format, lambda a, b: str(max(int(a), int(b))), weight=2.0
        ),
        Skill(
            "subtraction", "mathematics", ordered_numbers, "{}-{}>".format, lambda a, b: str(int(a) - int(b)), weight=0
        ),
        Skill("reverse", "code", word, "rev({})>".format, lambda w: w[::-1]),
        Skill("double", "code", word, "dup({})>".format, lambda w: w + w, weight=0.7),
        Skill("upper", "code", word, "up({})>".format, str.upper, weight=0.7),
        Skill("composition", "code", word, "rev(dup({}))>".format, lambda w: (w + w)[::-1], weight=0),
        Skill("quoted", "instruction", word, "{} quoted>".format, lambda w: f'"{w}"', weight=0.7),
        Skill("twice", "instruction", word, "{} twice>".format, lambda w: f"{w} {w}", weight=0.7),
        Skill("loud", "instruction", word, "{} loud>".format, lambda w: f"{w}!", weight=0.7),
        Skill("spelled", "instruction", word, "{} spelled>".format, lambda w: "-".join(w), weight=0),
    ]
    return {skill.name: skill for skill in skills}


def pretraining_items(skills: dict[str, Skill], generator: random.Random) -> Iterator[dict[str, str]]:
    """An endless stream of pretraining items: train-split operands of the skills that are no targets.

    Raises:
        FoLoRAError: an item matches the prompt of a target, so that the target would not be new.
    """
    pretrained = [skill for skill in skills.values() if not skill.is_target]
    weights = [skill.weight for skill in pretrained]
    targets = {item["prompt"] for skill in skills.values() if skill.is_target for item in every_item(skill)}
    while True:
        skill = generator.choices(pretrained, weights)[0]
        item = skill.item(skill.draw_from("train", generator))
        if item["prompt"] in targets:
            raise FoLoRAError(f"world: the target prompt {item['prompt']!r} occurs in {skill.name}: the skills overlap")
        yield item


def every_item(skill: Skill) -> list[dict[str, str]]:
    """The items of all splits of a skill, as ``write_world`` draws them."""
    return [item for split in SPLIT_BUCKETS for item in skill.distinct_items(split, ALL_ITEMS, random.Random(split))]


def write_world(world: World, output: Path) -> None:
    """Write the data of every skill as JSON lines, and an evaluation task for each.

    ``output`` gets ``SKILL/test.jsonl`` and ``train.jsonl`` for every skill, ``validation.jsonl`` for the targets, and
    in ``evaluation/`` one lm-evaluation-harness task a file, whose data files are relative to ``output``.
    """
    with publish(output) as folder:
        (folder / "evaluation").mkdir(parents=True)
        for skill in build_skills(world).values():
            counts = {"test": world.test_items, "train": ALL_ITEMS}
            if skill.is_target:
                counts["validation"] = world.test_items
            (folder / skill.name).mkdir()
            for split, count in counts.items():
                items = skill.distinct_items(split, count, random.Random(split))
                lines = [json.dumps(item) + "\n" for item in items]
                (folder / skill.name / f"{split}.jsonl").write_text("".join(lines))
                if split != "train":
                    name = skill.name if split == "test" else f"{skill.name}-{split}"
                    _write_evaluation_task(folder / "evaluation" / f"{name}.yaml", name, f"{skill.name}/{split}.jsonl")


def _write_evaluation_task(path: Path, name: str, data: str) -> None:
    write_json(  # JSON is YAML, and it is written the same way everywhere
        path,
        {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": data}},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "prompt",  # a column's name: the harness compiles a template anew for every item
            "doc_to_target": "response",
            "target_delimiter": "",
            "generation_kwargs": {"until": [], "max_gen_toks": LONGEST_ANSWER, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0},
        },
    )
