"""The README's table of options is the code's. `python tests/test_readme.py` writes it anew."""

from __future__ import annotations

import re
from pathlib import Path

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


def test_the_readmes_configurations_compose() -> None:
    load_config(["job=generate", "model=hf", "model.path=./my-model", "dataset.path=x.jsonl", "offload=all-disk"])


if __name__ == "__main__":
    README.write_text(MARKED.sub(lambda found: found[1] + options_table() + found[3], README.read_text()))
