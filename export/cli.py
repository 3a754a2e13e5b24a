"""Commands around checkpoints. Light at import: torch is loaded only by the command that needs it."""

import typer

app = typer.Typer()
