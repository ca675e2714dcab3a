"""The command `lora-rlhf ui`: the one place where the library reaches up to the app.

Everything of `ui` is imported inside functions, so that the help needs neither torch nor gradio.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from lora_rlhf.errors import ConfigError

EPILOG = (
    "Try:\n\nlora-rlhf ui\n\nlora-rlhf ui quickstart --open\n\n"
    "lora-rlhf ui --add-user ana --admin --users users.txt\n\n"
    "lora-rlhf ui --users users.txt --listen"
)


def ui(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN",
            help="Unset: the newest and all on its backbone.",
            show_default=False,
        ),
    ] = None,
    runs_dir: Annotated[Path, typer.Option(help="Where runs lie.")] = Path("runs"),
    store: Annotated[
        str, typer.Option(metavar="PATH|URL", help="Of votes: an SQLite file, or postgresql://...")
    ] = "rankings.db",
    host: Annotated[str, typer.Option(help="Address to bind to.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Unset: 7860, or the next free one.")
    ] = None,
    listen: Annotated[
        bool, typer.Option("--listen", help="Let other machines in, by plain http; needs --users.")
    ] = False,
    users: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Who may log in; unset: nobody has to.")
    ] = None,
    add_user: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Add to --users, or give a new password; then end."),
    ] = None,
    admin: Annotated[
        bool, typer.Option("--admin", help="With --add-user: may export and retrain.")
    ] = False,
    host_name: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A name that others know this server by; repeatable."),
    ] = None,
    root_path: Annotated[
        str, typer.Option(metavar="URL", help="Where a reverse proxy serves it; TLS is its job.")
    ] = "",
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page.")] = False,
    i_know: Annotated[
        bool, typer.Option("--i-know-it-is-open", help="Let in whoever finds it, without a login.")
    ] = False,
) -> None:
    """Chat, compare, rank and retrain in the browser."""
    if add_user is not None or admin:
        _add_user(add_user, users, admin)
        return
    from ui.opening import main
    from ui.server import EVERYWHERE, LOOPBACK, Settings

    settings = Settings(
        host=EVERYWHERE if listen and host == LOOPBACK else host,
        port=port,
        users=users,
        open_to_all=i_know,
        host_names=tuple(host_name or ()),
        root_path=root_path,
        open_browser=open_browser,
    )
    main(runs or [], runs_dir=runs_dir, store=store, settings=settings, say=typer.echo)


def _add_user(name: str | None, path: Path | None, admin: bool) -> None:
    if name is None:
        raise ConfigError("--admin says what a new user may do: give --add-user NAME, too.")
    if path is None:
        raise ConfigError(f"--add-user {name} needs the file to write to: --users FILE")
    from ui.users import add_user, check_name

    check_name(name, "--add-user")
    if sys.stdin.isatty():
        password = typer.prompt(f"Password for {name}", hide_input=True, confirmation_prompt=True)
    else:
        password = sys.stdin.readline().rstrip("\r\n")
    new = add_user(path, name, password, admin)
    role = "an admin" if admin else "a labeler"
    done = f"Added {name}" if new else f"{name} has a new password and is"
    typer.echo(f"{done}{' as' if new else ''} {role} in {path}")
