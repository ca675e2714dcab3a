"""Padding, masks, micro-batches by budget, and records that do not fit."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_rlhf.data.batches import (
    make_sequences,
    plan_batches,
    tokenise_demonstrations,
    tokenise_prompts,
    tokenise_rankings,
    tokenise_texts,
)
from lora_rlhf.data.records import Demonstration, Message, Prompt, Ranking, Text, user
from lora_rlhf.data.template import ChatFormat, RefusedMessages
from tests.data.fakes import STRICT_TEMPLATE, gpt2, llama3, sentencepiece

ids = st.lists(st.integers(1, 90), min_size=1, max_size=12)
rows = st.lists(st.tuples(ids, ids), min_size=1, max_size=8)


def faults(batches: list[list[int]], lengths: list[int], budget: int) -> list[str]:
    """What is wrong with a plan, by its definition."""
    found = []
    if sorted(i for batch in batches for i in batch) != list(range(len(lengths))):
        found.append("not every index exactly once")
    for batch in batches:
        if not batch:
            found.append("an empty batch")
        elif len(batch) > 1 and len(batch) * max(lengths[i] for i in batch) > budget:
            found.append("over the budget")
    return found


@given(st.lists(st.integers(1, 40), max_size=40), st.integers(1, 120))
def test_a_plan_covers_every_index_once_within_the_padded_budget(lengths, budget):
    batches = plan_batches(lengths, budget)
    assert faults(batches, lengths, budget) == []
    assert plan_batches(lengths, budget) == batches
    # Sorted by length, so that rows of one batch have little to pad.
    in_order = [lengths[i] for batch in batches for i in batch]
    assert in_order == sorted(lengths)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(40, 200))
def test_a_plan_wastes_no_batch(lengths, budget):
    batches = plan_batches(lengths, budget)
    for batch, after in pairwise(batches):
        assert (len(batch) + 1) * lengths[after[0]] > budget


def test_plans_that_count_live_tokens_or_lose_rows_are_found_out():
    lengths, budget = [1, 1, 9, 10], 21
    live = [[0, 1, 2, 3]]  # 21 live tokens, 40 with padding
    assert faults(live, lengths, budget) == ["over the budget"]
    assert faults([[0, 1], [2]], lengths, budget) == ["not every index exactly once"]
    assert faults([[0, 1, 1], [2, 3]], lengths, budget) == ["not every index exactly once"]
    assert plan_batches(lengths, budget) == [[0, 1], [2, 3]]
    assert plan_batches([], 10) == []
    assert plan_batches([50, 3], 10) == [[1], [0]]


@given(rows, st.integers(0, 99))
def test_padding_and_back_gives_the_same_rows(rows, pad):
    sequences = make_sequences([p for p, _ in rows], [r for _, r in rows], pad)
    assert sequences.input_ids.shape == (len(rows), max(len(p) + len(r) for p, r in rows))
    for i, (prompt, response) in enumerate(rows):
        line = sequences.input_ids[i].tolist()
        split, end = int(sequences.prompt_lengths[i]), int(sequences.lengths[i])
        assert line[:split] == prompt
        assert line[split:end] == response
        assert set(line[end:]) <= {pad}
        assert sequences.input_ids[i][sequences.token_mask[i]].tolist() == response
        assert int(sequences.response_mask[i].sum()) == len(response)
        assert bool(sequences.response_mask[i, : len(response)].all())
    assert sequences.input_ids.dtype == torch.long
    assert sequences.response_mask.shape[1] == max(len(r) for _, r in rows)


@given(rows, st.randoms(use_true_random=False))
def test_selected_rows_are_as_if_padded_alone(rows, random):
    chosen = random.sample(range(len(rows)), random.randint(1, len(rows)))
    prompts, responses = [p for p, _ in rows], [r for _, r in rows]
    selected = make_sequences(prompts, responses, 0).select(chosen)
    alone = make_sequences([prompts[i] for i in chosen], [responses[i] for i in chosen], 0)
    for field in ("input_ids", "lengths", "prompt_lengths"):
        assert torch.equal(getattr(selected, field), getattr(alone, field))


def test_a_response_that_holds_the_pad_id_stays_live():
    sequences = make_sequences([[5]], [[0, 7, 0]], pad_id=0)
    assert sequences.response_mask.tolist() == [[True, True, True]]


# -- what does not fit --------------------------------------------------------------------------


def test_over_long_prompts_and_responses_are_dropped_and_counted_never_cut():
    chat = ChatFormat(llama3())
    short, long = "So?", "Once upon a time there was a little boy named Ben. " * 4
    demos = [Demonstration(user(a), b) for a, b in [(short, short), (long, short), (short, long)]]
    limit = len(chat.prompt_ids(user(short)))
    kept, dropped = tokenise_demonstrations(demos, chat, limit, 5)
    assert kept == [(chat.prompt_ids(user(short)), chat.response_ids(short))]
    assert dropped == {f"prompt over {limit} tokens": 1, "response over 5 tokens": 1}
    prompts, dropped = tokenise_prompts([Prompt(d.prompt) for d in demos], chat, limit)
    assert [p.messages for _, p in prompts] == [user(short)] * 2
    assert dropped == {f"prompt over {limit} tokens": 1}
    # One token less would drop them all.
    assert tokenise_prompts([Prompt(user(short))], chat, limit - 1)[0] == []


def test_one_over_long_answer_drops_its_whole_ranking():
    chat = ChatFormat(llama3())
    long = "Once upon a time there was a little boy. " * 4
    good = Ranking(user("So?"), ("Paris", "France", "Ben"), ((1,), (0, 2)))
    bad = Ranking(user("So?"), ("Paris", long), ((0,), (1,)))
    kept, dropped = tokenise_rankings([good, bad], chat, 99, 12)
    assert kept == [
        (chat.prompt_ids(good.prompt), [chat.response_ids(r) for r in good.responses], good)
    ]
    assert all(ids[-1] == chat.end_id for ids in kept[0][1])
    assert dropped == {"response over 12 tokens": 1}


def test_a_plain_continuation_is_cut_at_the_limit_without_an_end():
    chat = ChatFormat(gpt2(), "none")
    record = Demonstration(user("Once"), " upon a time there was a little boy named Ben.")
    whole = chat.response_ids(record.response)
    kept, dropped = tokenise_demonstrations([record], chat, 9, 4)
    assert kept[0][1] == whole[:4]
    assert chat.end_id not in kept[0][1]
    assert dropped == {}
    kept, _ = tokenise_demonstrations([record], chat, 9, len(whole))
    assert kept[0][1] == whole
    assert tokenise_texts([Text("Once upon")], chat, 3)[0] == chat.text_ids("Once upon")[:3]


def test_a_text_of_which_the_tokenizer_makes_nothing_is_dropped():
    chat = ChatFormat(llama3())
    kept, dropped = tokenise_demonstrations([Demonstration(user("So?"), " \n")], chat, 99, 99)
    assert (kept, dropped) == ([], {"response without tokens": 1})


def test_a_few_prompts_that_the_template_refuses_are_dropped_all_of_them_are_an_error():
    chat = ChatFormat(sentencepiece(template=STRICT_TEMPLATE))
    turn: Message = {"role": "user", "content": "So?"}
    odd, even = Prompt((turn, turn)), Prompt((turn,))
    kept, dropped = tokenise_prompts([odd, even], chat, 99)
    assert [p for _, p in kept] == [even]
    assert dropped == {"prompt refused by the chat template": 1}
    with pytest.raises(RefusedMessages, match="roles must alternate"):
        tokenise_prompts([odd, odd], chat, 99)
