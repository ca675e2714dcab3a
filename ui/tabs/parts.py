"""What more than one tab has."""

from typing import Any

import gradio as gr

from ui.asking import Facts


def sampling_panel(facts: Facts, elem_id: str) -> list[Any]:
    """Temperature, top-p, length and seed, folded away; in the order of `controls_of`."""
    with gr.Accordion("Sampling", open=False, elem_id=elem_id), gr.Row():
        return [
            gr.Slider(0.0, 2.0, facts.temperature, step=0.05, label="Temperature"),
            gr.Slider(0.05, 1.0, 1.0, step=0.05, label="Top-p"),
            gr.Slider(
                1, facts.most_new_tokens, facts.default_new_tokens, step=1, label="Longest answer"
            ),
            gr.Number(None, precision=0, label="Seed (empty: a new one each time)"),
        ]
