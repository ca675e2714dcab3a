"""Where a tab is laid out."""

import gradio as gr
from gradio.context import Context


def this_tab() -> gr.Tab:
    """The tab whose `with` block the caller is in."""
    tab = Context.block
    assert isinstance(tab, gr.Tab), "lay it out inside `with gr.Tab(...)`"
    return tab
