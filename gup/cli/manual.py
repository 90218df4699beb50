"""The commands as manual pages: `python -m gup.cli.manual` writes deploy/man; a test compares."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typer.main import get_command

from gup.cli.app import app
from gup.cli.shared import sentence

STATUSES = {
    "": {0: "Done.", 1: "It failed, or not all of it could be done; standard error says why.",
         2: "Flags or settings can't be used; nothing was done, and all mistakes are listed."},
    "gup serve": {0: "The service was told to stop, and has ended."},
    "gup reload": {3: "Some of the settings wait for a restart of the service."},
    "gup demo": {0: "Every byte was right and no file was fetched twice.", 1: "A byte was wrong or missing.",
                 2: "A file was fetched twice, or a flag can't be used.",
                 3: "gup did not start, or ended early.",
                 4: "gup's figures are not those of the management server.", 130: "Interrupted."},
    "gup simulate clients": {0: "Every byte was right.", 1: "A byte was wrong or missing.",
                             3: "The simulated manager's catalogue can't be fetched."},
}  # fmt: skip
"""Exit statuses of all commands, and where single ones have others; docs/commands.md has them too."""


def manual_pages() -> dict[str, str]:
    """A page for each command, by its file's name: what `--help` says, for man(7)."""
    pages: dict[str, str] = {}

    def visit(command: Any, names: list[str], above: Any) -> None:
        ctx = command.make_context(names[-1], [], parent=above, resilient_parsing=True)
        below = [(name, command.get_command(ctx, name)) for name in getattr(command, "commands", ())]
        pages["-".join(names) + ".1"] = _manual_page(command, ctx, " ".join(names), below)
        for name, sub in below:
            visit(sub, [*names, name], ctx)

    visit(get_command(app), ["gup"], None)
    return pages


def _manual_page(command: Any, ctx: Any, name: str, below: Sequence[tuple[str, Any]]) -> str:
    arguments: list[tuple[str, str]] = []
    options: list[tuple[str, str]] = []
    for parameter in command.get_params(ctx):
        if record := parameter.get_help_record(ctx):
            (arguments if parameter.param_type_name == "argument" else options).append(record)
    title = name.replace(" ", "-")
    lines = [f'.TH "{_roff(title.upper())}" "1" "" "gup" "Group Update Provider"']
    lines += [".SH NAME", f"{_roff(title)} \\- {_roff(sentence(command))}"]
    usage = " ".join(command.collect_usage_pieces(ctx)).replace("{", "").replace("}", "")
    lines += [".SH SYNOPSIS", f".B {_roff(name)}", _roff(usage), ".SH DESCRIPTION"]
    paragraphs = [" ".join(text.split()) for text in (command.help or "").split("\n\n")]
    lines += [line for text in paragraphs for line in (".PP", _roff(text))]
    statuses = STATUSES[""] | STATUSES.get(name, {})
    for heading, rows in (
        ("COMMANDS", [(sub, sentence(one)) for sub, one in below]),
        ("ARGUMENTS", arguments),
        ("OPTIONS", options),
        ("EXIT STATUS", [] if below else [(str(status), text) for status, text in sorted(statuses.items())]),
    ):
        lines += [f".SH {heading}"] if rows else []
        lines += [line for left, right in rows for line in (".TP", f".B {_roff(left)}", _roff(right))]
    others = [f"{title}-{sub}" for sub, _ in below] if below else ["gup"]
    lines += [".SH SEE ALSO", ", ".join(f"{_roff(other)}(1)" for other in others)]
    return "\n".join(lines) + "\n"


def _roff(text: str) -> str:
    """Text as roff takes it: no escape, no request, and dashes that can be copied."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped


if __name__ == "__main__":
    for name, text in manual_pages().items():
        Path("deploy", "man", name).write_text(text, encoding="utf-8")
