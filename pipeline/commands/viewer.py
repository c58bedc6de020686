"""A page for `dvc plots show` and `dvc plots diff` that opens without a network.

DVC's own page loads Vega from a content delivery network. This one holds Vega, Vega-Lite and Vega-Embed from the
installed `vl-convert`, and DVC's option `plots.html_template` names it. Page and option are on this machine alone
(git ignores them). Without them DVC uses its own page.
"""

import configparser
import html
import subprocess
from importlib.metadata import version
from pathlib import Path

from pipeline.core import records
from pipeline.core.errors import UserError
from pipeline.core.progress import say

CONFIG = Path(".dvc") / "config.local"
PAGE = Path(".dvc") / "plots.local.html"
HEAD = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="lora-repro" content="{made_of}">
{{refresh_tag}}
<title>lora-repro: plots</title>
<style>
body {{ margin: 2rem; font: 14px/1.4 system-ui, sans-serif; color: #1f2328; background: #ffffff; }}
body > div {{ margin-bottom: 2.5rem; overflow-x: auto; }}
table {{ border-spacing: 15px; }}
</style>
<script>
{script}
</script>
</head>
<body>
{{plot_divs}}
</body>
</html>
"""


def prepare() -> None:
    """Write the page, unless the one of the installed packages is there, and configure DVC to use it.

    A page that the user has configured in `.dvc/config.local` stays. UserError outside of a DVC project.
    """
    if not CONFIG.parent.is_dir():
        raise UserError(f"{CONFIG.parent} is missing: run this in the project folder")
    configured = _configured()
    if configured not in (None, PAGE.name):
        say(f"{CONFIG} has its own plots.html_template, {configured}: it stays")
        return
    made_of = f"vl-convert-python {version('vl-convert-python')}"
    mark = f'content="{html.escape(made_of)}"'
    if not PAGE.is_file() or mark not in PAGE.read_text(encoding="utf-8")[:400]:
        records.write_text(PAGE, HEAD.format(made_of=html.escape(made_of), script=_script()))
    if configured is None:
        command = ["dvc", "config", "--local", "plots.html_template", PAGE.name]
        subprocess.run(command, check=True, capture_output=True)
        say(f"`dvc plots` now uses {PAGE}, which needs no network")


def _configured() -> str | None:
    """The page that DVC is configured to use on this machine; None for its own."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(CONFIG, encoding="utf-8")
    except configparser.Error as error:
        raise UserError(f"{CONFIG} cannot be read, mend or remove it: {error}") from None
    return parser.get("plots", "html_template", fallback=None)


def _script() -> str:
    import vl_convert

    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")  # the one name that DVC's plots call
    # These would end the script or the comment in the page, or be replaced by DVC.
    for word in ("</script", "<!--", "{plot_divs}", "{scripts}", "{refresh_tag}"):
        assert word not in script, word
    return script
