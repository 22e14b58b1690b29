"""The README's table of options is the code's. `python tests/test_readme.py` writes it anew."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from flexbatch.__main__ import VERBS
from flexbatch.composition import load_config
from flexbatch.errors import FlexbatchError
from flexbatch.overrides import GROUPS, default_text, keys, type_name

README = Path(__file__).resolve().parent.parent / "README.md"
MARKED = re.compile(r"(<!-- options:begin -->\n)(.*?)(<!-- options:end -->)", re.DOTALL)


def options_table() -> str:
    lines = ["", "| key | what | values | default |", "| --- | --- | --- | --- |"]
    for key in keys():
        values = type_name(key).replace("|", "\\|")
        default = default_text(key).replace("|", "\\|")
        shown = default if default in ("empty", "must be given") else f"`{default}`"
        lines.append(f"| `{key.name}` | {key.rules['doc']} | {values} | {shown} |")
    return "\n".join([*lines, "", ""])


def test_the_table_of_options_is_the_codes() -> None:
    found = MARKED.search(README.read_text())
    assert found is not None
    assert found[2] == options_table(), "run: python tests/test_readme.py"


def test_every_key_that_the_readme_names_exists() -> None:
    known = {key.name for key in keys()}
    named = re.findall(rf"(?<![\w/.])((?:{'|'.join(GROUPS)})\.[a-z_]+)=", README.read_text())
    assert named
    assert set(named) <= known


def test_every_exit_code_is_in_the_readme() -> None:
    classes = [FlexbatchError]
    for found in classes:
        classes.extend(found.__subclasses__())
    for code in {found.exit_code for found in classes}:
        assert f"\n| {code} |" in README.read_text()


def commands() -> list[list[str]]:
    """Every `flexbatch ...` in the README's shell blocks, as the shell would split it."""
    found: list[list[str]] = []
    for block in re.findall(r"```bash\n(.*?)```", README.read_text(), re.DOTALL):
        for word in shlex.split(block, comments=True):
            if word == "flexbatch":
                found.append([])
            elif found:
                found[-1].append(word)
    return found


def test_the_commands_of_the_readme_are_right() -> None:
    runs = [command for command in commands() if not command or command[0] in ("run", "plan") or "=" in command[0]]
    assert runs
    for command in runs:
        load_config([argument for argument in command if "=" in argument])


def test_the_verbs_of_the_readme_exist() -> None:
    verbs = {command[0] for command in commands() if command and "=" not in command[0] and command[0][0] != "-"}
    assert verbs <= set(VERBS)


if __name__ == "__main__":
    README.write_text(MARKED.sub(lambda found: found[1] + options_table() + found[3], README.read_text()))
