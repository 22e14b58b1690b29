"""From `key=value` arguments to a checked `Config`. Hydra picks and merges the group files; the values are ours.

The command line's values do not go through Hydra's grammar, in which `prompt.template={{ text }}` is a broken mapping
and `data(1).csv` a function call. A text option takes its argument as it stands; lists and mappings are YAML's flow
form (`[a, b]`, with escapes such as "\\n" inside double quotes); a list of one may leave its brackets out.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flexbatch.config import Config
from flexbatch.errors import ConfigError
from flexbatch.overrides import GROUPS, convert, doc, find_key, keys, near_miss, split_override
from flexbatch.validation import check

PACKAGE = Path(__file__).resolve().parent
ALTERNATIVES = (("prompt.template", "prompt.template_file"), ("job.schema", "job.regex", "job.choices"))
# What a ready-made job says about the columns of its sample shards; it does not hold for data of the user's own.
SAMPLE_COLUMNS = ("dataset.id_column", "dataset.split", "output.columns", "job.gold", "job.reference")


def bundled(name: str) -> Path:
    """A folder that the wheel carries inside the package and a checkout beside it: `conf` or `jobs`."""
    packaged = PACKAGE / name
    return packaged if packaged.is_dir() else PACKAGE.parent / name


def last_component(path: str) -> str:
    """`facebook/opt-125m` and `/data/opt-125m/` are both named `opt-125m` (`conf/model/hf.yaml`)."""
    return Path(path).resolve().name or "model"


OmegaConf.register_new_resolver("last_component", last_component, replace=True)
OmegaConf.register_new_resolver("jobs_dir", lambda: str(bundled("jobs")), replace=True)
OmegaConf.register_new_resolver("model_dir", lambda: str(PACKAGE / "embedded"), replace=True)


def group_options(group: str, folders: Sequence[Path]) -> list[str]:
    return sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})


def choose(group: str, option: str, folders: Sequence[Path]) -> str:
    known = group_options(group, folders)
    if option not in known:
        listed = ", ".join(known[:12]) + (f" and {len(known) - 12} more" if len(known) > 12 else "")
        hub = " Any other model: model=hf model.path=FOLDER-or-hub-id." if group == "model" else ""
        raise ConfigError(
            f"{group}={option}: there is no such {group}.",
            remedy=f"{near_miss(option, known)}There are {listed or 'none'}.{hub}",
        )
    return f"{group}={option}"


@functools.lru_cache(maxsize=8)
def compose_groups(choices: tuple[str, ...], config_dir: Path | None) -> Any:
    """The merged group files as an OmegaConf node of the schema `Config`."""
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    ConfigStore.instance().store(name="options", node=Config)
    GlobalHydra.instance().clear()
    search = [f"hydra.searchpath=[file://{config_dir.resolve()}]"] if config_dir else []
    try:
        with initialize_config_dir(config_dir=str(bundled("conf")), version_base="1.3"):
            return compose(config_name="config", overrides=[*search, *choices])
    except (HydraException, OmegaConfBaseException) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ConfigError(
            f"The config files do not fit together: {reason}",
            remedy="Check the file that is named; its keys must be those that `flexbatch --help` lists.",
        ) from error


def load_config(overrides: Sequence[str], config_dir: Path | None = None) -> Config:
    """Compose, fill in and check. Values on the command line win over a job's, which win over the groups' defaults.

    `config_dir` is a folder of the user's own with `job/mine.yaml` and the like. Raises ConfigError.
    """
    folders = [bundled("conf"), *([config_dir] if config_dir else [])]
    pairs = [split_override(argument) for argument in overrides]
    choices = [choose(name, value, folders) for name, value in pairs if name in GROUPS]
    keyed = [(name, find_key(name), text) for name, text in pairs if name not in GROUPS]
    values = [(name, key, convert(key, text)) for name, key, text in keyed]
    node = copy.deepcopy(compose_groups(tuple(choices), config_dir))
    forget_what_is_replaced(node, {name for name, _ in pairs})
    for name, key, value in values:
        if not key.rules.get("verbatim"):
            added = bool(key.subkey) or isinstance(value, dict)
            OmegaConf.update(node, name, value, merge=False, force_add=added)
    config = resolved(node)
    for _, key, value in values:
        if key.rules.get("verbatim"):
            group, field = key.name.split(".", 1)
            setattr(getattr(config, group), field, value)
    check(config)
    return config


def forget_what_is_replaced(node: Any, named: set[str]) -> None:
    """Whoever names an alternative, or data in place of a job's sample shards, does not mean what the job has there."""
    forgotten = [name for names in ALTERNATIVES if named & set(names) for name in names]
    if "dataset.path" in named and str(node.dataset.path).startswith(str(bundled("jobs"))):
        forgotten += SAMPLE_COLUMNS
    defaults = Config()
    for name in forgotten:
        group, field = name.split(".")
        OmegaConf.update(node, name, getattr(getattr(defaults, group), field), merge=False, force_add=True)


def resolved(node: Any) -> Config:
    """The node as plain dataclasses, `${...}` filled in, `~` in paths too."""
    try:
        unresolved: Any = OmegaConf.to_container(node, resolve=False)
        for name in ("model.path", "model.name"):
            group, field = name.split(".")
            if unresolved[group][field] == MISSING:
                raise ConfigError(f"{name} is not set.", remedy=f"Add {name}= and {doc(name)}.")
        config = OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{getattr(error, 'full_key', None) or 'a value'}: {' '.join(str(error).split())}",
            remedy="Check the ${...} in this value.",
        ) from error
    assert isinstance(config, Config)
    for key in keys():
        if key.rules.get("path"):
            group, field = key.name.split(".", 1)
            setattr(getattr(config, group), field, expand_home(getattr(getattr(config, group), field)))
    return config


def expand_home(path: Any) -> Any:
    if isinstance(path, list):
        return [expand_home(entry) for entry in path]
    return str(Path(path).expanduser()) if isinstance(path, str) and path.startswith("~") else path


def as_yaml(config: Config) -> str:
    return str(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True))


def save_config(config: Config, overrides: Sequence[str], folder: Path) -> None:
    """`.hydra/config.yaml` and `.hydra/overrides.yaml`, where Hydra's users look for them. The fingerprint is apart."""
    target = folder / ".hydra"
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.yaml").write_text(as_yaml(config))
    (target / "overrides.yaml").write_text(str(yaml.safe_dump(list(overrides), allow_unicode=True)))
