"""Commands by which atlases are checked, joined and shared: atlas validate, merge, export, import."""

from __future__ import annotations

from typing import Annotated

import typer

from forgetcast.cli.app import atlas_app, out, print_json
from forgetcast.cli.options import AsJson

AtlasLocation = Annotated[str, typer.Argument(help="Directory or URL of the atlas.")]


@atlas_app.command()
def validate(atlas: AtlasLocation, as_json: AsJson = False) -> None:
    """Read every byte of an atlas, and say what is damaged, lost or foreign, and what to do about it.

    Exit code: 0 the atlas is whole, 1 it is not, 2 there is no atlas.

    Example: forgetcast atlas validate runs.atlas
    """
    from forgetcast.atlas.validate import validate as check

    findings = check(atlas)
    errors = sum(finding.severity == "error" for finding in findings)
    if as_json:
        print_json({"atlas": atlas, "whole": not errors, "findings": [vars(finding) for finding in findings]})
    else:
        for finding in findings:
            out.print(f"{finding.severity}: {finding.file}: {finding.message}", markup=False, soft_wrap=True)
        out.print(f"{atlas} {f'is not whole: {errors} errors' if errors else 'is whole'}", markup=False)
    if errors:
        raise typer.Exit(1)
