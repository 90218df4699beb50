"""The command line `gup`: all its commands. Each imports its heavy modules itself."""

from typing import Annotated, Any

import typer

import gup
from gup.cli import admin_commands, cache_commands, reports, serve, settings_commands
from gup.cli.shared import FAILED, UNUSABLE, Commands
from gup.errors import GupError, SettingsError


class _Gup(Commands):
    """Errors of all commands become lines on standard error and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except GupError as error:
            unusable = isinstance(error, SettingsError)
            for problem in error.problems if isinstance(error, SettingsError) else [str(error)]:
                typer.echo(f"gup: {problem}", err=True)
            raise typer.Exit(UNUSABLE if unusable else FAILED) from error


app = typer.Typer(
    cls=_Gup,
    help="A Group Update Provider: fetches content over the WAN once, serves it to the whole site.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gup {gup.__version__}")
        raise typer.Exit


@app.callback()
def _gup(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    del version  # its callback has done the work


app.command("serve")(serve.serve)
app.command("demo")(serve.demo)
app.add_typer(serve.simulate, name="simulate")
app.add_typer(settings_commands.config, name="config")
app.add_typer(cache_commands.cache, name="cache")
app.add_typer(settings_commands.rules, name="rules")
app.add_typer(reports.report, name="report")
app.command("status")(admin_commands.status)
app.command("why")(admin_commands.why)
app.command("reload")(admin_commands.reload)
app.add_typer(admin_commands.alarms, name="alarms")
app.command("upgrade")(admin_commands.upgrade)
app.command("prefetch")(admin_commands.prefetch)
app.command("hold")(admin_commands.hold)
app.command("release")(admin_commands.release)
app.command("holds")(admin_commands.holds)
app.command("budget")(admin_commands.budget)
app.command("outbreak")(admin_commands.outbreak)
