"""What a recipe must hold beyond the type of each field: presets, needs, settings without effect.

Every rule is a function named after what it demands; it yields (path, sentence) for each breach.
"""

import importlib.util
import re
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path as FilePath
from typing import Any, NamedTuple

from lora_rlhf.recipe import STAGES, Base, Data, Ppo, Recipe, Section, Source, is_store
from lora_rlhf.recipe_problems import Path, Problem, dotted

JUDGES = ("builtin:gold", "vader")

# ALGORITHMS 1a.15. The warm-up is 10 of InstructGPT's 500 rounds. ptx_coef is left to the user:
# the paper's 27.8 belongs to its own loss reduction.
INSTRUCTGPT: dict[str, Any] = {
    "kl_coef": 0.02,
    "adaptive_kl_target": None,
    "ppo_epochs": 1,
    "clip_range": 0.2,
    "gamma": 1.0,
    "gae_lambda": 0.95,
    "temperature": 1.0,
    "schedule": "constant",
    "warmup_fraction": 0.02,
    "ema_decay": 0.992,
    "value": "adapter",
    "value_warmup_steps": 0,
}
A2C: dict[str, Any] = {"ppo_epochs": 1, "clip_range": None, "value_clip_range": None}


def preset_values(ppo: dict[str, Any]) -> dict[str, Any]:
    """The fields that `ppo.preset` fixes; {} without a preset or with an unknown one."""
    if ppo.get("preset") == "instructgpt":
        return dict(INSTRUCTGPT)
    if ppo.get("preset") == "a2c":
        return A2C | {
            "minibatch_size": ppo.get("batch_size", Ppo.model_fields["batch_size"].default)
        }
    return {}


def expand_preset(raw: dict[str, Any]) -> list[Problem]:
    """Write a preset's values into `raw["ppo"]`; a field given otherwise is a problem."""
    ppo = raw.get("ppo")
    if not isinstance(ppo, dict):
        return []
    problems: list[Problem] = []
    for field, value in preset_values(ppo).items():
        if field in ppo and ppo[field] != value:
            problems.append(
                (
                    ("ppo", field),
                    f"ppo.{field} is {_text(ppo[field])}, but the preset {ppo['preset']} sets it "
                    f"to {_text(value)}. Remove ppo.{field}, or ppo.preset.",
                )
            )
        ppo.setdefault(field, value)
    return problems


# -- settings without effect --------------------------------------------------------------------


class Idle(NamedTuple):
    """A field that does nothing while `when(section)` holds, and what to tell the user."""

    field: str
    when: Callable[[Any], bool]
    reason: str


IDLE: dict[type[Section], tuple[Idle, ...]] = {
    Base: (Idle("revision", lambda b: not is_hub_id(b.model), "a revision belongs to a hub id"),),
    Source: (
        Idle("split", lambda s: s.hub is None, "a split belongs to a hub dataset"),
        Idle(
            "columns",
            lambda s: s.builtin is not None or is_store(s.path or ""),
            "builtin sources and stores have our field names",
        ),
        Idle("separator", lambda s: not _is_text_file(s), "it cuts a .txt file into documents"),
        Idle(
            "prompt_tokens",
            lambda s: s.builtin in ("demonstrations", "prompts") or is_store(s.path or ""),
            "it splits plain text into prompt and response",
        ),
        Idle("heldout", lambda s: not is_store(s.path or ""), "a store alone knows such prompts"),
    ),
    Ppo: (
        Idle(
            "adaptive_kl_horizon",
            lambda p: p.adaptive_kl_target is None,
            "kl_coef is fixed unless ppo.adaptive_kl_target is set",
        ),
        Idle(
            "value_coef",
            lambda p: p.value == "adapter",
            "it weighs the loss of a shared trunk, and ppo.value is adapter",
        ),
        Idle(
            "value_learning_rate",
            lambda p: p.value == "shared",
            "a shared trunk trains at ppo.learning_rate; weigh the loss by ppo.value_coef",
        ),
        Idle("ptx_batch_size", lambda p: p.ptx_coef == 0, "ppo.ptx_coef is 0"),
        Idle("missing_eos_score", lambda p: p.missing_eos == "none", "ppo.missing_eos is none"),
        Idle(
            "target_kl",
            lambda p: p.ppo_epochs == 1 and p.minibatch_size == p.batch_size,
            "one epoch of one minibatch has nothing left to stop",
        ),
    ),
}


def idle_fields(section: Section) -> dict[str, str]:
    """Fields of the section that have no effect as the others stand -> the reason."""
    return {i.field: i.reason for i in IDLE.get(type(section), ()) if i.when(section)}


def sections(section: Section, path: Path = ()) -> Iterator[tuple[Path, Section]]:
    """The section and every section in it, with their paths."""
    yield path, section
    for field in type(section).model_fields:
        value = getattr(section, field)
        if isinstance(value, Section):
            yield from sections(value, (*path, field))


def no_setting_without_effect(recipe: Recipe, done: Collection[str]) -> Iterator[Problem]:
    """A field the user wrote must do something."""
    for path, section in sections(recipe):
        for field, reason in idle_fields(section).items():
            if field in section.model_fields_set and getattr(section, field) is not None:
                here = (*path, field)
                yield here, f"{dotted(here)} has no effect: {reason}. Remove it."


# -- what stages need ---------------------------------------------------------------------------


def at_least_one_stage(recipe: Recipe, done: Collection[str]) -> Iterator[Problem]:
    """A recipe runs something."""
    if not recipe.stages:
        yield (), f"no stage is given. Add one of: {', '.join(STAGES)} (such as `sft: {{}}`)."


def sft_needs_demonstrations(recipe: Recipe, done: Collection[str]) -> Iterator[Problem]:
    """SFT learns from demonstrations."""
    if recipe.sft and not recipe.data.demonstrations:
        yield ("sft",), "sft needs demonstrations. Add data.demonstrations: path, hub or builtin."


def later_stages_need_sft(recipe: Recipe, done: Collection[str]) -> Iterator[Problem]:
    """Answers are sampled from `sft`, and `reward` and `policy` start as copies of it."""
    later = [s for s in recipe.stages if s != "sft"]
    if later and "sft" not in {*recipe.stages, *done}:
        yield (
            (later[0],),
            f"{later[0]} starts from the adapter sft. Add an sft section, or name a run that has "
            f"finished sft with --name.",
        )


def reward_needs_one_source_of_rankings(recipe: Recipe, done: Collection[str]) -> Iterator[Problem]:
    """Rankings come from `rank` or from `data.rankings`, not from both."""
    if recipe.rank and recipe.data.rankings:
        yield ("rank",), "rank and data.rankings both make rankings. Remove one of the two."
    if recipe.reward and not (recipe.rank or recipe.data.rankings or "rank" in done):
        yield (
            ("reward",),
            "reward needs rankings. Add data.rankings (human ones), or rank (a simulated labeler).",
        )


def ppo_needs_a_score(recipe: Recipe, done: Collection[str]) -> Iterator[Problem]:
    """PPO maximises the reward adapter's score, a judge's, or the noise of a control."""
    ppo = recipe.ppo
    if ppo and not (ppo.random_reward or ppo.judge or _has_reward(recipe, done)):
        yield (
            ("ppo",),
            "ppo needs the adapter reward. Add a reward section, or name a run that has finished "
            "reward with --name; ppo.random_reward=true is a control without one.",
        )


def sampling_needs_prompts(recipe: Recipe, done: Collection[str]) -> Iterator[Problem]:
    """rank, ppo and evaluate sample answers to prompts."""
    data = recipe.data
    some = data.prompts or data.demonstrations
    for stage in ("rank", "ppo"):
        if getattr(recipe, stage) and not some:
            yield (stage,), f"{stage} needs prompts. Add data.prompts or data.demonstrations."
    if recipe.evaluate and not (some or data.heldout_prompts):
        yield ("evaluate",), "evaluate needs prompts. Add data.heldout_prompts."


def ptx_needs_text(recipe: Recipe, done: Collection[str]) -> Iterator[Problem]:
    """The ptx mix draws on data.text, else on the demonstrations."""
    if not recipe.ppo:
        return
    if recipe.ppo.ptx_coef and not (recipe.data.text or recipe.data.demonstrations):
        yield ("ppo", "ptx_coef"), "ppo.ptx_coef needs data.text or data.demonstrations."
    if recipe.data.text and not recipe.ppo.ptx_coef:
        yield (
            ("data", "text"),
            "data.text has no effect: ppo.ptx_coef is 0. Set ppo.ptx_coef, or remove data.text.",
        )


def evaluation_needs_a_reward_or_a_judge(
    recipe: Recipe, done: Collection[str]
) -> Iterator[Problem]:
    """Best-of-n chooses by the reward adapter, which also judges when nobody else does."""
    if not recipe.evaluate or _has_reward(recipe, done):
        return
    for field in ("best_of", "frontier"):
        if found := getattr(recipe.evaluate, field):
            yield (
                ("evaluate", field),
                f"evaluate.{field} is {found}, which chooses by the adapter reward, and there is "
                f"none. Set evaluate.{field}=0, or add a reward section.",
            )
    if recipe.evaluate.judge is None:
        yield ("evaluate",), "evaluate needs a judge or the adapter reward. Set evaluate.judge."


# -- values that cannot mean what was meant -----------------------------------------------------


def the_model_can_be_named(recipe: Recipe, done: Collection[str]) -> Iterator[Problem]:
    """builtin:tiny is the only embedded base."""
    model = recipe.base.model
    if model.startswith("builtin:") and model != "builtin:tiny":
        yield (
            ("base", "model"),
            f"base.model is {_text(model)}. Allowed: builtin:tiny, a local directory, a hub id.",
        )


def adaptive_kl_can_move(recipe: Recipe, done: Collection[str]) -> Iterator[Problem]:
    """The controller multiplies: it needs a start above 0 and steps below a whole horizon."""
    ppo = recipe.ppo
    if ppo is None or ppo.adaptive_kl_target is None:
        return
    if ppo.kl_coef == 0.0:
        yield ("ppo", "kl_coef"), "ppo.kl_coef is 0, which an adaptive KL never leaves. Set it > 0."
    if ppo.batch_size >= 5 * ppo.adaptive_kl_horizon:
        yield (
            ("ppo", "adaptive_kl_horizon"),
            f"ppo.adaptive_kl_horizon is {ppo.adaptive_kl_horizon}, too short for ppo.batch_size="
            f"{ppo.batch_size}. Allowed: more than a fifth of the batch size; 10000 is usual.",
        )


def judges_can_be_named(recipe: Recipe, done: Collection[str]) -> Iterator[Problem]:
    """A judge is built in, or a function that can be imported."""
    for stage in ("rank", "ppo", "evaluate"):
        judge = getattr(getattr(recipe, stage), "judge", None)
        if judge is None or judge in JUDGES:
            if judge == "vader" and importlib.util.find_spec("vaderSentiment") is None:
                yield (
                    (stage, "judge"),
                    f"{stage}.judge is vader, and vaderSentiment is not installed. "
                    f"Run: {sys.executable} -m pip install vaderSentiment",
                )
        elif stage == "evaluate" and judge.partition(":")[0] in ("reward", "human", "openai"):
            continue  # the evaluation reads these
        elif not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", judge) or judge.startswith(
            "builtin:"
        ):
            yield (
                (stage, "judge"),
                f"{stage}.judge is {_text(judge)}. Allowed: {', '.join(JUDGES)}, or "
                f"package.module:function.",
            )


def builtin_data_fit_their_place(recipe: Recipe, done: Collection[str]) -> Iterator[Problem]:
    """The toy world has demonstrations, prompts and text, and no rankings."""
    fits = {
        "demonstrations": "demonstrations",
        "prompts": "prompts",
        "heldout_prompts": "prompts",
        "text": "text",
        "rankings": None,
    }
    assert set(fits) == {f for f in Data.model_fields if "max" not in f and "fraction" not in f}
    for field, builtin in fits.items():
        source: Source | None = getattr(recipe.data, field)
        if source is not None and source.builtin not in (None, builtin):
            instead = f"Allowed: {builtin}" if builtin else "Use a rank section instead"
            yield (
                ("data", field, "builtin"),
                f"data.{field}.builtin is {source.builtin}. {instead}.",
            )


def stores_stand_for_rankings(recipe: Recipe, done: Collection[str]) -> Iterator[Problem]:
    """A store holds rankings and their prompts; its password would lie open in every run."""
    for path, section in sections(recipe):
        if not isinstance(section, Source) or not section.path or not is_store(section.path):
            continue
        here = (*path, "path")
        if path[-1] not in ("rankings", "prompts", "heldout_prompts"):
            yield (
                here,
                f"{dotted(here)} is a store of rankings, which holds no {path[-1]}. Allowed there: "
                f"data.rankings, data.prompts, data.heldout_prompts.",
            )
        if re.match(r"[^/]*://[^/@]*:[^/@]*@", section.path):
            yield (
                here,
                f"{dotted(here)} holds a password, and every run keeps a copy of its recipe. Put "
                f"it into ~/.pgpass or the environment variable PGPASSWORD.",
            )


def ppo_numbers_fit_together(recipe: Recipe, done: Collection[str]) -> Iterator[Problem]:
    """Pairs of numbers that would silently switch something off, or turn it round."""
    ppo = recipe.ppo
    if ppo is None:
        return
    if ppo.adaptive_kl_target and ppo.kl_coef == 0:
        yield (
            ("ppo", "kl_coef"),
            "ppo.kl_coef is 0, and ppo.adaptive_kl_target multiplies it. Start at 0.1, say.",
        )
    if ppo.missing_eos == "penalty" and ppo.missing_eos_score >= 0:
        yield (
            ("ppo", "missing_eos_score"),
            f"ppo.missing_eos_score is {ppo.missing_eos_score:g}, and ppo.missing_eos=penalty "
            f"adds it. Give a number under 0, such as -1.",
        )
    if ppo.value_warmup_steps >= ppo.steps:
        yield (
            ("ppo", "value_warmup_steps"),
            f"ppo.value_warmup_steps ({ppo.value_warmup_steps}) leaves none of ppo.steps "
            f"({ppo.steps}) to the policy. Give fewer.",
        )


def best_of_one_is_sft(recipe: Recipe, done: Collection[str]) -> Iterator[Problem]:
    """The best of one answer is an answer."""
    for field in ("best_of", "frontier"):
        if recipe.evaluate and getattr(recipe.evaluate, field) == 1:
            yield (
                ("evaluate", field),
                f"evaluate.{field} is 1, which is sft once more. Allowed: 0 (none), or 2 to 64.",
            )


Rule = Callable[[Recipe, Collection[str]], Iterator[Problem]]
RULES: tuple[Rule, ...] = (
    at_least_one_stage,
    the_model_can_be_named,
    judges_can_be_named,
    builtin_data_fit_their_place,
    stores_stand_for_rankings,
    sft_needs_demonstrations,
    later_stages_need_sft,
    reward_needs_one_source_of_rankings,
    ppo_needs_a_score,
    sampling_needs_prompts,
    ptx_needs_text,
    evaluation_needs_a_reward_or_a_judge,
    ppo_numbers_fit_together,
    adaptive_kl_can_move,
    best_of_one_is_sft,
    no_setting_without_effect,
)


def broken_rules(recipe: Recipe, done: Collection[str] = ()) -> list[Problem]:
    """Every breach of every rule; `done` names stages that the run has already finished."""
    return [problem for rule in RULES for problem in rule(recipe, done)]


def is_hub_id(model: str) -> bool:
    """Whether a base.model is neither built in nor a directory here."""
    looks_local = model.startswith(("builtin:", ".", "/", "~"))
    return not looks_local and not FilePath(model).is_dir()


def _has_reward(recipe: Recipe, done: Collection[str]) -> bool:
    return "reward" in {*recipe.stages, *done}


def _is_text_file(source: Source) -> bool:
    return source.path is not None and source.path.lower().endswith((".txt", ".txt.gz"))


def _text(value: Any) -> str:
    return "null" if value is None else str(value)
