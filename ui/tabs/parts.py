"""What more than one tab has."""

from typing import Any

import gradio as gr

from ui.asking import Facts
from ui.chatting import MOST_BEST_OF


def sampling_panel(facts: Facts, elem_id: str, best_of: bool = False) -> list[Any]:
    """Temperature, top-p, length, seed and maybe best-of, folded away; ordered as `controls_of`."""
    with gr.Accordion("Sampling", open=False, elem_id=elem_id), gr.Row():
        fields: list[Any] = [
            gr.Slider(0.0, 2.0, facts.temperature, step=0.05, label="Temperature"),
            gr.Slider(0.05, 1.0, 1.0, step=0.05, label="Top-p"),
            gr.Slider(
                1, facts.most_new_tokens, facts.default_new_tokens, step=1, label="Longest answer"
            ),
            gr.Number(None, precision=0, label="Seed (empty: a new one each time)"),
        ]
        if best_of:
            fields.append(best_of_field(f"{elem_id}-best-of"))
    return fields


def best_of_field(elem_id: str) -> gr.Number:
    """How many answers are drawn at once, of which the reward adapter picks one."""
    return gr.Number(
        1,
        precision=0,
        minimum=1,
        maximum=MOST_BEST_OF,
        step=1,
        label="Best of (the reward adapter picks)",
        elem_id=elem_id,
    )
