"""Recipes as text: what is accepted, what is refused, and in which words."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_rlhf import recipe_io, recipe_rules
from lora_rlhf.errors import ConfigError
from lora_rlhf.recipe import Evaluate, Ppo, Recipe, Sft
from lora_rlhf.recipe_io import differences, dump_recipe, find_recipe, load_recipe, parse_recipe

SFT = """\
name: x
base:
  model: builtin:tiny
data:
  demonstrations: {builtin: demonstrations}
sft: {}
"""
WHOLE = (
    SFT
    + """\
rank: {judge: builtin:gold}
reward: {}
ppo: {}
evaluate: {}
"""
)


def parse(text: str, *overrides: str, finished: tuple[str, ...] = ()) -> Recipe:
    return parse_recipe(text, "recipes/x.yaml", overrides, finished)


def refusal(text: str, *overrides: str, finished: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text, *overrides, finished=finished)
    return str(caught.value)


# -- the text itself ----------------------------------------------------------------------------


def test_a_minimal_recipe_has_the_defaults_of_its_sections() -> None:
    assert parse(SFT).sft == Sft()


def test_numbers_are_read_as_numbers_in_every_notation() -> None:
    recipe = parse(SFT, "sft.learning_rate=1e-3", "sft.checkpoint_every=1_000", "sft.epochs=2")
    assert recipe.sft is not None
    assert recipe.sft.learning_rate == 0.001
    assert recipe.sft.checkpoint_every == 1000
    assert recipe.sft.epochs == 2.0


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("name: x\nname: y\n", 2, "name is given twice (first in line 1)"),
        ("name: x\nbase: {model: a, model: b}\n", 2, "model is given twice"),
        ("name: x\n\tbase: 1\n", 2, "a tab where spaces are needed"),
        ("name: [x\n", 2, "not valid YAML"),
        ("name: x\nbase: y: z\n", 2, "not valid YAML"),
        ("name: &a x\nsft: *a\n", 2, "aliases are not allowed"),
        ("name: !!python/object/apply:os.getcwd []\n", 1, "the tag"),
        ("name: x\n---\nname: y\n", 2, "a second document begins here"),
        ("name: x\n3: y\n", 2, "the key '3' is not a name"),
        ("name: 'x\x00'\n", 1, "is not allowed"),
        ("[" * 5000, 1, "too deep"),
    ],
)
def test_bad_yaml_names_its_file_and_line(text: str, line: int, words: str) -> None:
    message = refusal(text)
    assert message.startswith(f"recipes/x.yaml:{line}: ")
    assert words in message


@pytest.mark.parametrize("text", ["", "# nothing\n", "just text", "- a\n- b\n"])
def test_a_text_that_is_no_mapping_is_no_recipe(text: str) -> None:
    assert refusal(text).startswith("recipes/x.yaml: not a recipe")


def test_an_empty_section_is_asked_about_and_not_dropped_silently() -> None:
    message = refusal(SFT + "ppo:\n")
    assert message.startswith("recipes/x.yaml:7: ppo is empty. Write `ppo: {}`")


def test_a_file_that_is_not_utf8_is_refused_with_its_name(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"r\.yaml: not UTF-8 text \(byte 9\)"):
        load_recipe(str(file))


# -- fields -------------------------------------------------------------------------------------


def test_an_unknown_field_names_the_near_one_and_all_allowed() -> None:
    message = refusal(SFT + "ppo:\n  kl_coeff: 0.1\n")
    assert message.startswith(
        "recipes/x.yaml:8: ppo.kl_coeff is not a field. Did you mean kl_coef? Allowed: "
        "learning_rate, "
    )
    assert "kl_coef, adaptive_kl_target" in message


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("sft.lr=1", "learning_rate"),
        ("lora.r=8", "rank"),
        ("lora.lora_alpha=8", "alpha"),
        ("ppo.cliprange=0.1", "clip_range"),
        ("ppo.lam=0.9", "gae_lambda"),
        ("ppo.num_ppo_epochs=1", "ppo_epochs"),
        ("ppo.lambda=0.9", "gae_lambda"),
        ("kl_coef=0.1", "ppo.kl_coef"),
        ("quantization=none", "base.quantization"),
        ("pppo={}", "ppo"),
    ],
)
def test_names_of_other_tools_and_typing_errors_are_understood(
    override: str, suggestion: str
) -> None:
    key = override.partition("=")[0]
    assert re.search(
        rf"^override {re.escape(override)}: {re.escape(key)} is not a field\. "
        rf"Did you mean {re.escape(suggestion)}( or [^?]*)?\?",
        refusal(SFT, override),
    )


@pytest.mark.parametrize(
    ("override", "found_and_allowed"),
    [
        ("sft.learning_rate=-1", "sft.learning_rate is -1. Allowed: a number over 0."),
        ("sft.learning_rate=1e999", "Allowed: a number over 0."),
        ("sft.learning_rate=.inf", 'is ".inf". Allowed: a number over 0.'),
        ("sft.batch_size=0.5", "sft.batch_size is 0.5. Allowed: a whole number at least 1."),
        ("sft.batch_size=true", "sft.batch_size is true. Allowed: a whole number at least 1."),
        ("sft.batch_size=010", 'sft.batch_size is "010". Allowed: a whole number at least 1.'),
        ("sft.batch_size='8'", 'sft.batch_size is "8". Allowed: a whole number at least 1.'),
        ("lora.dropout=1", "lora.dropout is 1. Allowed: a number at least 0 and under 1."),
        ("sft.schedule=cosin", 'is "cosin". Did you mean cosine? Allowed: cosine, constant'),
        ("lora.use_dora=yes", 'is "yes". Write true or false. Allowed: true or false.'),
        ("base.revision=1234", "is 1234. Put it in quotes to make it text. Allowed: text or null."),
        ("lora.target_modules=[1]", "is [1]. Allowed: text or a list of text."),
        ("sft=3", "sft is 3. Allowed: a mapping of learning_rate, "),
        ("name=Foo Bar", 'name is "Foo Bar". Allowed: text matching ^[a-z0-9]'),
        ("data.demonstrations.columns.prompt=3", "columns.prompt is 3. Put it in quotes"),
        ("data.demonstrations.path=x", "found: ['path', 'builtin']). To replace all of it"),
        ("base=null", "base is missing."),
    ],
)
def test_a_wrong_value_is_told_with_what_was_found_and_what_is_allowed(
    override: str, found_and_allowed: str
) -> None:
    assert found_and_allowed in refusal(SFT, override)


def test_all_problems_are_told_at_once() -> None:
    message = refusal(SFT, "sft.epochs=0", "sft.lr=1", "lora.rank=x", "sedd=1")
    assert len(message.splitlines()) == 4


# -- overrides ----------------------------------------------------------------------------------


def test_an_override_changes_one_field_and_makes_an_absent_section() -> None:
    recipe = parse(SFT, "lora.rank=4", "evaluate.judge=builtin:gold", "evaluate.best_of=0")
    assert recipe.lora.rank == 4
    assert recipe.evaluate == Evaluate(judge="builtin:gold", best_of=0)


def test_null_removes_a_section_and_resets_a_field_that_cannot_be_null() -> None:
    text = WHOLE.replace("ppo: {}", "ppo: {kl_coef: 0.3, clip_range: 0.1}")
    recipe = parse(text, "ppo.kl_coef=null", "ppo.clip_range=null")
    assert recipe.ppo is not None
    assert recipe.ppo.kl_coef == Ppo().kl_coef
    assert recipe.ppo.clip_range is None
    assert parse(text, "ppo=null").ppo is None


def test_a_later_override_wins_and_a_mapping_replaces_a_section() -> None:
    recipe = parse(
        SFT, "seed=1", "seed=2", "data.demonstrations={path: my.jsonl, columns: {prompt: q}}"
    )
    assert recipe.seed == 2
    assert recipe.data.demonstrations is not None
    assert recipe.data.demonstrations.path == "my.jsonl"
    assert recipe.data.demonstrations.columns == {"prompt": "q"}


def test_relative_paths_stay_as_they_are_given() -> None:
    recipe = parse(SFT, "data.demonstrations={path: ../data/my.jsonl}")
    assert recipe.data.demonstrations is not None
    assert recipe.data.demonstrations.path == "../data/my.jsonl"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sft", "not key=value"),
        ("=3", "not key=value"),
        ("sft..epochs=3", "not key=value"),
        ("--sft.epochs=3", "not key=value"),
        ("sft.epochs=", "no value. Write sft.epochs=null"),
        ("sft.epochs=[1", "not valid YAML"),
        ("base.model.x=1", "base.model is the value 'builtin:tiny', which has no fields"),
    ],
)
def test_a_bad_override_is_told_as_such(override: str, words: str) -> None:
    message = refusal(SFT, override)
    assert message.startswith(f"override {override!r}: ")
    assert words in message


# -- presets ------------------------------------------------------------------------------------


def test_instructgpt_sets_the_numbers_of_the_paper() -> None:
    """Ouyang et al. 2022, C.4: beta 0.02 fixed, one epoch, clip 0.2, no discount, EMA 0.992,
    constant rate after 10 of 500 rounds of warm-up, a value function of its own."""
    ppo = parse(WHOLE, "ppo.preset=instructgpt").ppo
    assert ppo is not None
    assert (ppo.kl_coef, ppo.adaptive_kl_target, ppo.ppo_epochs) == (0.02, None, 1)
    assert (ppo.clip_range, ppo.gamma, ppo.gae_lambda, ppo.temperature) == (0.2, 1.0, 0.95, 1.0)
    assert (ppo.schedule, ppo.warmup_fraction, ppo.ema_decay) == ("constant", 0.02, 0.992)
    assert (ppo.value, ppo.ptx_coef) == ("adapter", 0.0)


def test_instructgpt_leaves_ptx_to_the_user() -> None:
    ppo = parse(WHOLE, "ppo.preset=instructgpt", "ppo.ptx_coef=0.5").ppo
    assert ppo is not None
    assert ppo.ptx_coef == 0.5


def test_a2c_is_one_epoch_of_one_minibatch_without_clipping() -> None:
    ppo = parse(WHOLE, "ppo.preset=a2c", "ppo.batch_size=48").ppo
    assert ppo is not None
    assert (ppo.ppo_epochs, ppo.minibatch_size, ppo.batch_size) == (1, 48, 48)
    assert (ppo.clip_range, ppo.value_clip_range) == (None, None)


@pytest.mark.parametrize(
    ("preset", "field", "value", "fixed"),
    [
        ("instructgpt", "kl_coef", "0.1", "0.02"),
        ("instructgpt", "adaptive_kl_target", "6", "null"),
        ("a2c", "clip_range", "0.2", "null"),
        ("a2c", "minibatch_size", "32", "64"),
    ],
)
def test_a_field_that_contradicts_its_preset_is_refused(
    preset: str, field: str, value: str, fixed: str
) -> None:
    message = refusal(WHOLE, f"ppo.preset={preset}", f"ppo.{field}={value}")
    assert f"ppo.{field} is {value}, but the preset {preset} sets it to {fixed}." in message
    assert message.startswith(f"override ppo.{field}={value}: ")


def test_a_field_that_agrees_with_its_preset_is_accepted() -> None:
    assert parse(WHOLE, "ppo.preset=instructgpt", "ppo.ppo_epochs=1").ppo is not None


# -- settings without effect --------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        ("ppo.adaptive_kl_horizon=10000",),
        ("ppo.value_coef=0.1",),
        ("ppo.value=shared", "ppo.value_learning_rate=1e-5"),
        ("ppo.ptx_batch_size=16",),
        ("ppo.missing_eos=none", "ppo.missing_eos_score=-1"),
        ("ppo.ppo_epochs=1", "ppo.minibatch_size=64", "ppo.target_kl=0.1"),
        ("base.revision=main",),
        ("data.demonstrations.split=train",),
        ("data.demonstrations.columns={prompt: q}",),
        ("data.demonstrations.separator=x",),
        ("data.demonstrations.prompt_tokens=8",),
        ("data.text={builtin: text}",),
    ],
)
def test_a_setting_without_effect_is_refused_even_at_its_default(
    overrides: tuple[str, ...],
) -> None:
    key = overrides[-1].partition("=")[0]
    assert f"{key} has no effect: " in refusal(WHOLE, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ("ppo.adaptive_kl_horizon=10000", "ppo.adaptive_kl_target=6"),
        ("ppo.value_coef=0.1", "ppo.value=shared"),
        ("ppo.value_learning_rate=1e-5",),
        ("ppo.ptx_batch_size=16", "ppo.ptx_coef=0.1", "data.text={builtin: text}"),
        ("ppo.missing_eos_score=-2",),
        ("ppo.target_kl=0.1",),
        ("base.model=Qwen/Qwen3-0.6B", "base.revision=main"),
        ("data.demonstrations={hub: a/b, split: train, columns: {prompt: q}}",),
        ("data.demonstrations={path: a.txt.gz, separator: x, prompt_tokens: 8}",),
    ],
)
def test_the_same_settings_are_accepted_where_they_have_an_effect(
    overrides: tuple[str, ...],
) -> None:
    assert parse(WHOLE, *overrides)


def test_every_idle_field_exists_in_its_section() -> None:
    for section, idles in recipe_rules.IDLE.items():
        assert {i.field for i in idles} <= set(section.model_fields)


# -- what stages need ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("data.demonstrations=null",), "sft needs demonstrations"),
        (("sft=null",), "rank starts from the adapter sft"),
        (("rank=null",), "reward needs rankings"),
        (("data.rankings={path: r.jsonl}",), "rank and data.rankings both make rankings"),
        (("reward=null",), "ppo needs the adapter reward"),
        (("reward=null",), "evaluate.best_of is 4"),
        (("reward=null",), "evaluate needs a judge"),
        (("data.demonstrations=null", "sft=null"), "rank needs prompts"),
        (("data.demonstrations=null", "sft=null"), "ppo needs prompts"),
        (("data.demonstrations=null", "sft=null"), "evaluate needs prompts"),
        (("data.demonstrations=null", "sft=null", "ppo.ptx_coef=1"), "ppo.ptx_coef needs"),
        (("base.model=builtin:huge",), "Allowed: builtin:tiny, a local directory, a hub id"),
        (("rank.judge=gold",), "rank.judge is gold. Allowed: builtin:gold, vader, or"),
        (("rank.judge=builtin:silver",), "rank.judge is builtin:silver. Allowed:"),
        (("data.prompts={builtin: text}",), "data.prompts.builtin is text. Allowed: prompts"),
        (("data.rankings={builtin: text}",), "Use a rank section instead"),
        (("ppo.kl_coef=0", "ppo.adaptive_kl_target=6"), "multiplies it"),
        (("ppo.missing_eos=penalty", "ppo.missing_eos_score=1"), "adds it"),
        (("ppo.steps=2",), "leaves none of ppo.steps (2) to the policy"),
        (("evaluate.best_of=1",), "sft once more"),
        (("sft=null", "rank=null", "reward=null", "ppo=null", "evaluate=null"), "no stage"),
    ],
)
def test_a_recipe_that_cannot_run_is_refused(overrides: tuple[str, ...], words: str) -> None:
    assert words in refusal(WHOLE, *overrides)


def test_the_rules_lean_on_what_the_run_has_finished() -> None:
    done = ("sft", "rank", "reward")
    text = WHOLE.replace("sft: {}\n", "").replace("rank: {judge: builtin:gold}\nreward: {}\n", "")
    assert parse(text, finished=done).stages == ("ppo", "evaluate")
    assert "ppo needs the adapter reward" in refusal(text, finished=("sft",))


def test_a_control_needs_no_reward() -> None:
    for control in ("ppo.random_reward=true", "ppo.judge=builtin:gold"):
        assert parse(SFT, control).stages == ("sft", "ppo")
    both = refusal(SFT, "ppo.random_reward=true", "ppo.judge=builtin:gold")
    assert "random_reward and judge exclude each other" in both
    assert "ppo.judge is gold" in refusal(SFT, "ppo.judge=gold")


# -- finding ------------------------------------------------------------------------------------


def test_a_recipe_is_found_by_name_and_by_path(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(SFT, encoding="utf-8")
    assert find_recipe(str(file)) == file
    assert find_recipe("quickstart").name == "quickstart.yaml"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("quikstart", "quikstart is not a recipe. Did you mean quickstart? Allowed: "),
        ("no/such.yaml", "no/such.yaml: does not exist"),
        ("recipes/quikstart.yaml", "Did you mean quickstart?"),
    ],
)
def test_a_recipe_that_is_not_there_names_the_near_one(name: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_recipe(name)
    assert words in str(caught.value)


# -- writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("ppo.preset=instructgpt", "ppo.ptx_coef=0.1"),
        ("ppo.preset=a2c",),
        ("ppo.value=shared", "ppo.clip_range=null", "lora.target_modules=[q_proj, v_proj]"),
        ("ppo.missing_eos=none", "tracker=tensorboard", "ppo.adaptive_kl_target=6"),
        ("data.prompts={hub: a/b, name: '1e5', split: 'true', limit: 3}", "base.revision=null"),
        ("data.text={path: 'a: b #c.txt', separator: '<|endoftext|>'}", "ppo.ptx_coef=1e-8"),
    ],
)
def test_a_dumped_recipe_loads_back_equal(overrides: tuple[str, ...]) -> None:
    recipe = parse(WHOLE, *overrides)
    assert parse(dump_recipe(recipe)) == recipe


@given(
    text=st.text(st.characters(codec="utf-8", exclude_categories=("C", "Zl", "Zp")), min_size=1),
    number=st.floats(min_value=1e-12, max_value=1e12),
)
def test_any_text_and_number_survive_a_dump(text: str, number: float) -> None:
    recipe = parse(WHOLE)
    assert recipe.sft is not None
    changed = recipe.model_copy(
        update={
            "sft": recipe.sft.model_copy(update={"learning_rate": number}),
            "base": recipe.base.model_copy(update={"pad_token": text}),
        }
    )
    assert parse(dump_recipe(changed)) == changed


def test_a_dump_writes_defaults_out_and_leaves_idle_fields_away() -> None:
    text = dump_recipe(parse(WHOLE))
    assert "kl_coef: 0.05" in text
    assert "adaptive_kl_horizon" not in text
    assert "null" not in text


def test_differences_name_the_fields_that_differ() -> None:
    old, new = parse(WHOLE), parse(WHOLE, "ppo.kl_coef=0.1", "evaluate=null")
    changed = {field: (a, b) for field, a, b in differences(old, new)}
    assert changed["ppo.kl_coef"] == (0.05, 0.1)
    assert changed["evaluate.best_of"] == (4, None)
    assert "sft.epochs" not in changed


def test_plain_data_is_validated_as_a_file_is() -> None:
    raw: dict[str, Any] = {"name": "x", "base": {"model": "builtin:tiny"}, "sftt": {}}
    with pytest.raises(ConfigError, match=r"^recipe: sftt is not a field\. Did you mean sft\?"):
        recipe_io.recipe_from(raw)
