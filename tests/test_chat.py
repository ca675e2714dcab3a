"""The chat's commands on a run with random adapters, without a terminal."""

import json
import re
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from lora_rlhf.chat.commands import Chat
from lora_rlhf.chat.engine import Engine
from lora_rlhf.chat.terminal import chat, converse
from lora_rlhf.cli import app
from lora_rlhf.data.records import user
from lora_rlhf.data.sources import load_demonstrations, require
from lora_rlhf.errors import ConfigError, DataError, UserError
from lora_rlhf.model.generation import Sampling
from lora_rlhf.recipe import Source
from lora_rlhf.runs import Run
from tests.small_run import small_run

SAMPLING = Sampling(12)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return small_run(tmp_path_factory.mktemp("runs") / "small", scale=0.1)


@pytest.fixture(scope="module")
def engine(run: Run) -> Engine:
    return Engine.open(run)


@pytest.fixture
def talk(engine: Engine) -> Chat:
    return Chat(engine, Console(file=StringIO(), width=100))


@pytest.fixture(scope="module")
def continuing(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    path = tmp_path_factory.mktemp("runs") / "plain"
    return Engine.open(small_run(path, ("sft",), base={"chat_template": "none"}, scale=0.02))


def said(talk: Chat) -> str:
    """What the console has shown since the last call."""
    file = talk.console.file
    assert isinstance(file, StringIO)
    text = file.getvalue()
    file.seek(0)
    file.truncate()
    return " ".join(text.split())


def after(talk: Chat, *lines: str) -> str:
    for line in lines:
        said(talk)
        assert talk.handle(line)
    return said(talk)


def roles(talk: Chat) -> list[str]:
    return [m["role"] for m in talk.history]


# -- answers --------------------------------------------------------------------------------------


def test_the_answer_is_that_of_the_decode_loop_and_its_pieces_join_to_it(engine):
    from lora_rlhf.model.generation import generate

    pieces: list[str] = []
    reply = engine.answer("policy", user("Tell of the owl."), SAMPLING, 7, pieces.append)
    ids = engine.backbone.format.prompt_ids(user("Tell of the owl."))
    with engine.backbone.adapters.use("policy"):
        (answer,) = generate(engine.backbone, [ids], [7], SAMPLING)
    assert reply.ids == answer.ids
    assert len(pieces) > 3
    assert "".join(pieces) == reply.text == engine.backbone.format.decode(answer.ids)


def test_the_best_of_several_is_the_one_the_reward_adapter_scores_highest(engine):
    from lora_rlhf.model.generation import generate
    from lora_rlhf.training.rollout import score_answers

    asked, seeds = user("Tell of the owl."), [3, 1, 4, 15, 9]
    reply, scores = engine.best("sft", asked, SAMPLING, seeds)
    ids = engine.backbone.format.prompt_ids(asked)
    with engine.backbone.adapters.use("sft"):
        alone = [generate(engine.backbone, [ids], [seed], SAMPLING)[0] for seed in seeds]
    expected = [float(score_answers(engine.backbone, [ids], [a.ids], 100)[0]) for a in alone]
    # fp32, in another batch
    assert scores == pytest.approx(sorted(expected, reverse=True), abs=1e-4)
    assert max(expected) - min(expected) > 0.01
    assert reply.ids == alone[expected.index(max(expected))].ids
    assert reply.text == engine.backbone.format.decode(reply.ids)
    assert not reply.stopped
    assert engine.judge(reply).score == pytest.approx(scores[0], abs=1e-4)


def test_best_of_is_a_setting_and_its_score_is_told(talk):
    plain = after(talk, "/set seed 5", "Tell of the owl.")
    assert "Best of" not in plain
    shown = after(talk, "/set best_of 4", "/set seed 5", "/new", "Tell of the owl.")
    assert "Best of 4: score " in shown
    best, mean = (
        float(w.strip(",.")) for w in shown.rpartition("score ")[2].split() if w[0] in "+-"
    )
    assert best > mean
    assert " ".join(talk.history[1]["content"].split()) in shown
    again = after(talk, "/set seed 5", "/new", "Tell of the owl.")
    assert again == shown


@pytest.mark.parametrize("value", ["0", "65", "2.5", "many"])
def test_no_other_number_of_answers_is_drawn(talk, value):
    with pytest.raises(ConfigError, match=r"Allowed: a whole number from 1 to 64\."):
        talk.handle(f"/set best_of {value}")
    assert talk.settings.best_of == 1


def test_without_a_reward_adapter_the_best_is_refused(continuing):
    talk = Chat(continuing, Console(file=StringIO(), width=100))
    with pytest.raises(UserError, match="best-of-n chooses by a reward adapter, and reward is not"):
        talk.handle("/set best_of 2")
    assert talk.settings.best_of == 1
    with pytest.raises(UserError, match="ask for one answer"):
        continuing.best("sft", user("a"), SAMPLING, [1, 2])


def test_ctrl_c_while_several_are_drawn_keeps_the_question(talk, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_rlhf.chat.engine.sample", interrupted)
    shown = after(talk, "/set best_of 3", "Tell of the owl.")
    assert "Stopped before the first word." in shown
    assert roles(talk) == ["user"]


def test_a_letter_of_several_tokens_is_shown_whole_and_once(engine):
    from lora_rlhf.chat.engine import TextStream

    text = "an owl \N{OWL} and na\u00efve \u4f60\u597d"
    ids = engine.backbone.format.response_ids(text, end=False)
    assert len(ids) > len(text.split())
    pieces: list[str] = []
    stream = TextStream(engine.backbone.format, pieces.append)
    for token in ids:
        stream.add(token)
    stream.finish()
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_message_is_answered_and_both_stand_in_the_history(talk):
    shown = after(talk, "Tell of the owl.")
    assert roles(talk) == ["user", "assistant"]
    assert " ".join(talk.history[1]["content"].split()) in shown
    assert shown.startswith("policy: ")


def test_the_next_prompt_holds_the_turns_before(talk, engine, monkeypatch):
    seen = []
    answer = engine.answer
    monkeypatch.setattr(
        engine,
        "answer",
        lambda a, messages, *rest: seen.append(list(messages)) or answer(a, messages, *rest),
    )
    after(talk, "Tell of the owl.", "And then?")
    assert [len(m) for m in seen] == [1, 3]
    assert seen[1][:2] == talk.history[:2]


def test_the_oldest_turns_are_left_out_over_the_limit_and_the_user_is_told(talk):
    long = "Tell of the owl and the fox and the frog and the cat."
    shown = [after(talk, long) for _ in range(4)]
    assert "left out" not in shown[0]
    assert "over the 64 tokens" in shown[-1]
    assert len(talk.history) == 8  # nothing is forgotten, only not shown to the model
    ids, dropped = talk.engine.prompt_ids(talk.history[:-1])
    assert len(ids) <= 64
    assert dropped % 2 == 0
    kept = tuple(talk.history[dropped:-1])
    assert kept[0]["role"] == "user"
    assert ids == talk.engine.backbone.format.prompt_ids(kept)
    longer = tuple(talk.history[dropped - 2 : -1])
    assert len(talk.engine.backbone.format.prompt_ids(longer)) > 64


def test_a_message_over_the_limit_alone_is_refused_and_not_kept(talk):
    after(talk, "Tell of the owl.")
    before = list(talk.history)
    with pytest.raises(DataError, match="at most 64"):
        talk.handle("owl " * 100)
    assert talk.history == before


def test_the_same_lines_and_seed_give_the_same_answers_and_others_others(engine):
    def answers(seed: int) -> list[str]:
        talk = Chat(engine, Console(file=StringIO()))
        after(talk, f"/set seed {seed}", "Tell of the owl.", "And then?")
        return [m["content"] for m in talk.history]

    assert answers(5) == answers(5)
    assert answers(5) != answers(6)


def test_control_characters_of_a_model_do_not_reach_the_terminal(talk):
    talk._write("a\x1b[2Jb\rc\u00a0d\n")
    file = talk.console.file
    assert isinstance(file, StringIO)
    assert file.getvalue() == "a\ufffd[2Jb\ufffdc\u00a0d\n"


# -- commands -------------------------------------------------------------------------------------


def test_the_adapter_changes_who_answers(talk, engine):
    assert talk.adapter == "policy"
    assert "sft answers" in after(talk, "/adapter sft")
    assert after(talk, "Tell of the owl.").startswith("sft: ")
    assert after(talk, "/adapter base", "Tell of the owl.").startswith("base: ")
    assert engine.backbone.adapters.active is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/adaptr sft", r"Did you mean /adapter\?"),
        ("/xyzzy", "Allowed: /adapter, /compare"),
        ("/adapter polcy", r"Did you mean policy\?"),
        ("/adapter reward", "numbers, not answers"),
        ("/set temprature 1", r"Did you mean temperature\?"),
        ("/set temperature -1", "Allowed: 0"),
        ("/set temperature warm", "Allowed: 0"),
        ("/set temperature nan", "Allowed: 0"),
        ("/set top_p 0", "above 0, at most 1"),
        ("/set max_new_tokens 0", "whole number from 1 to 448"),
        ("/set max_new_tokens 500", "whole number from 1 to 448"),
        ("/set max_new_tokens 2.5", "whole number"),
        ("/set seed -1", "whole number from 0"),
        ("/compare sft", "two adapters"),
        ("/compare sft sft", "two adapters"),
        ("/compare sft polcy", "Did you mean policy"),
        ("/compare", "no prompt yet"),
        ("/retry", "no prompt yet"),
        ("/undo", "no prompt yet"),
        ("/save mine.jsonl", "no answer to save"),
        ("/role sft", "/adapter sft"),
    ],
)
def test_what_cannot_be_done_is_said_with_what_can(talk, line, message):
    if line == "/compare sft":
        talk.handle("/adapter sft")
    settings = talk.settings
    with pytest.raises(UserError, match=message):
        talk.handle(line)
    assert (talk.settings, talk.history) == (settings, [])


def test_set_changes_what_the_next_answer_is_drawn_with(talk):
    assert "max_new_tokens 3" in after(talk, "/set max_new_tokens 3")
    after(talk, "Tell of the owl.")
    ids = talk.engine.backbone.format.response_ids(talk.history[1]["content"], end=False)
    assert len(ids) <= 3
    after(talk, "/set temperature 0", "/retry")
    greedy = talk.history[1]
    after(talk, "/retry")
    assert talk.history[1] == greedy
    assert "top_p 0.5" in after(talk, "/set top_p=0.5")


def test_retry_replaces_the_last_answer(talk):
    after(talk, "Tell of the owl.")
    first = talk.history[1]
    after(talk, "/retry")
    assert roles(talk) == ["user", "assistant"]
    assert talk.history[1] != first


def test_undo_takes_back_one_exchange(talk):
    after(talk, "Tell of the owl.")
    kept = list(talk.history)
    assert "And then?" in after(talk, "And then?", "/undo")
    assert talk.history == kept
    after(talk, "/undo")
    assert talk.history == []


def test_new_forgets_the_dialogue(talk):
    after(talk, "Tell of the owl.", "/new")
    assert talk.history == []


def test_compare_shows_two_answers_with_score_and_kl_and_leaves_the_history(talk):
    after(talk, "Tell of the owl.")
    before = list(talk.history)
    shown = after(talk, "/compare")
    for part in ("sft", "policy", "score", "KL +0.0"):
        assert part in shown
    assert talk.history == before
    assert "base" in after(talk, "/compare base policy")
    assert "base" in after(talk, "/compare base")  # against the one that answers


def test_compare_of_the_best_of_several_shows_the_best_of_each(talk, monkeypatch):
    def scores_in(shown):
        return [float(found) for found in re.findall(r"score ([+-][\d.]+)", shown)]

    after(talk, "Tell of the owl.")
    drawn = []
    best = talk.engine.best

    def watched(*arguments):
        reply, scores = best(*arguments)
        drawn.append(scores)
        return reply, scores

    monkeypatch.setattr(talk.engine, "best", watched)
    shown = after(talk, "/set best_of 4", "/compare sft policy")
    assert "Each is the best of 4" in shown
    assert [len(scores) for scores in drawn] == [4, 4]
    # Shown with two decimals.
    assert scores_in(shown) == pytest.approx([max(scores) for scores in drawn], abs=0.006)
    assert "best of" not in after(talk, "/set best_of 1", "/compare sft policy")
    assert len(drawn) == 2


def test_score_and_kl_of_an_answer_are_those_of_whole_passes_by_hand(engine):
    """The head at the last token, and the sum of log-ratios from transformers' own logits."""
    reply = engine.answer("policy", user("Tell of the owl."), SAMPLING, 11)
    judged = engine.judge(reply)
    backbone = engine.backbone
    ids = torch.tensor([reply.prompt_ids + reply.ids])

    @torch.no_grad()
    def logprob(role: str) -> float:
        with backbone.adapters.use(role):
            table = backbone.causal_lm(ids).logits[0, :-1].log_softmax(-1)
        picked = table.gather(-1, ids[0, 1:, None])[:, 0]
        return float(picked[len(reply.prompt_ids) - 1 :].sum())

    with torch.no_grad(), backbone.adapters.use("reward"):
        score = float(backbone.adapters.heads["reward"](backbone.hidden_states(ids))[0, -1])
    assert judged.score == pytest.approx(score, abs=1e-4)
    assert judged.kl == pytest.approx(logprob("policy") - logprob("sft"), abs=1e-4)
    assert abs(judged.kl) > 1e-2
    assert engine.judge(engine.answer("sft", user("Tell."), SAMPLING, 1)).kl == 0.0


def test_without_reward_and_policy_compare_shows_base_and_sft(continuing):
    talk = Chat(continuing, Console(file=StringIO(), width=100))
    shown = after(talk, "Once upon", "/compare")
    assert "base" in shown
    assert "KL" in shown
    assert "score" not in shown


def test_a_saved_dialogue_is_a_demonstration_that_our_loader_reads(talk, tmp_path):
    file = tmp_path / "mine.jsonl"
    after(talk, "Tell of the owl.", "And then?", f"/save {file}", "/new")
    after(talk, "Tell of the na\u00efve fox.", f"/save {file}")
    first, second = require(load_demonstrations(Source(path=str(file))))
    assert [m["content"] for m in first.prompt][::2] == ["Tell of the owl.", "And then?"]
    assert second.prompt == user("Tell of the na\u00efve fox.")
    assert second.response == talk.history[-1]["content"]


def test_save_asks_for_a_jsonl_file_that_can_be_written(talk, tmp_path):
    after(talk, "Tell of the owl.")
    for name in ("", "notes.txt", str(tmp_path)):
        with pytest.raises(ConfigError, match="jsonl"):
            talk.handle(f"/save {name}")
    with pytest.raises(ConfigError, match="cannot be written"):
        talk.handle(f"/save {tmp_path}/none/mine.jsonl")


def test_role_and_help_list_all(talk):
    shown = after(talk, "/role info")
    for role in ("base", "sft", "reward", "policy", "builtin:tiny"):
        assert role in shown
    shown = after(talk, "/help")
    for command in ("adapter", "compare", "retry", "undo", "set", "save", "role", "quit"):
        assert f"/{command}" in shown


# -- a base that continues text -------------------------------------------------------------------


def test_a_continuing_base_takes_each_message_as_a_new_beginning(continuing, tmp_path):
    talk = Chat(continuing, Console(file=StringIO(), width=100))
    talk.welcome()
    assert "each message is a new beginning" in said(talk)
    assert after(talk, "Once upon a time").startswith("Once upon a time")
    after(talk, "The owl")
    ids, dropped = continuing.prompt_ids(talk.history[:-1])
    assert dropped == 0
    assert ids == continuing.backbone.format.prompt_ids(user("The owl"))
    after(talk, f"/save {tmp_path}/mine.jsonl")
    saved = [json.loads(line) for line in (tmp_path / "mine.jsonl").read_text().splitlines()]
    assert [s["messages"][0]["content"] for s in saved] == ["Once upon a time", "The owl"]
    demos = require(load_demonstrations(Source(path=str(tmp_path / "mine.jsonl"))))
    assert demos[1].response == talk.history[-1]["content"]


# -- the terminal ---------------------------------------------------------------------------------


def reader(*lines: str | type[BaseException]):
    """Gives the lines one by one, raises the exceptions among them, then the end of input."""
    left = iter(lines)

    def read(prompt: str) -> str:
        line = next(left, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return read


def test_ctrl_c_stops_the_answer_and_keeps_what_there_is_of_it(talk, monkeypatch):
    pieces: list[str] = []
    write = talk._write

    def write_three(text: str, style: str | None = None) -> None:
        write(text, style)
        pieces.append(text)
        if len(pieces) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(talk, "_write", write_three)
    shown = after(talk, "Tell of the owl.")
    assert "Stopped." in shown
    assert talk.history[1]["content"] == "".join(pieces[1:])
    assert talk.engine.backbone.adapters.active is None
    monkeypatch.undo()
    after(talk, "And then?")
    assert len(talk.history) == 4


def test_ctrl_c_before_the_first_word_leaves_an_unanswered_prompt_that_can_be_retried(
    talk, monkeypatch
):
    import lora_rlhf.chat.engine as module

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "generate", interrupted)
    assert "before the first word" in after(talk, "Tell of the owl.")
    monkeypatch.undo()
    after(talk, "/retry")
    assert roles(talk) == ["user", "assistant"]


def test_an_unanswered_prompt_gives_way_to_the_next_message(talk):
    talk.history = [{"role": "user", "content": "lost"}]
    after(talk, "Tell of the owl.")
    assert talk.history[0]["content"] == "Tell of the owl."
    assert roles(talk) == ["user", "assistant"]


def test_mistakes_and_ctrl_c_at_the_prompt_do_not_end_the_chat_and_ctrl_d_does(talk):
    converse(
        talk, reader("/nonsense", KeyboardInterrupt, "", "Tell of the owl.", EOFError, "never")
    )
    shown = said(talk)
    assert "not a command" in shown
    assert "Ctrl-D leaves" in shown
    assert roles(talk) == ["user", "assistant"]


def test_quit_leaves(talk):
    converse(talk, reader("/quit", "Tell of the owl."))
    assert talk.history == []


def test_a_run_is_opened_and_talked_to(run):
    file = StringIO()
    chat(run, Console(file=file, width=100), reader("/adapter sft", "Tell of the owl."))
    assert "policy answers" in file.getvalue()
    assert "sft: " in file.getvalue()


def test_the_command_reads_a_pipe_and_shows_what_it_read(run):
    result = CliRunner().invoke(app, ["chat", str(run.path)], input="Tell of the owl.\n/adaptr\n")
    assert result.exit_code == 0
    for part in ("> Tell of the owl.", "policy: ", "Did you mean /adapter?"):
        assert part in result.output


def test_a_run_without_adapters_lets_the_base_answer(tmp_path):
    file = StringIO()
    made = small_run(tmp_path / "bare", ())
    chat(made, Console(file=file, width=100), reader("/compare", "Tell of the owl."))
    assert "base answers, for the run has no adapter yet" in file.getvalue()
    assert "nothing to compare" in " ".join(file.getvalue().split())


def test_a_chat_starts_with_the_settings_of_training(talk):
    start = {"temperature": 1, "top_p": 1, "max_new_tokens": 12, "seed": 3, "best_of": 1}
    assert vars(talk.settings) == start


def test_a_damaged_recipe_is_told(tmp_path: Path):
    made = Run(tmp_path / "odd")
    (made.path / "recipe.yaml").write_text("name: odd\nbase: {model: builtin:none}\n")
    with pytest.raises(ConfigError, match="builtin:tiny"):
        chat(made, Console(file=StringIO()), reader())
