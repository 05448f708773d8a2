"""A page for each command, from the config models: the keys, words and examples of `--help` and `raytower config`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from raytower.cli.about import ABOUT
from raytower.cli.keys import Key, keys_of
from raytower.cli.starting import starting_config
from raytower.commands import COMMANDS, find_reference
from raytower.examples import EXAMPLES

# What the last word of a key's name says of its numbers.
_UNITS = {
    "bytes": "bytes",
    "ms": "milliseconds",
    "s": "seconds",
    "second": "a second",
    "seconds": "seconds",
    "minutes": "minutes",
}


def page_name(command: str) -> str:
    """Where a command's page lies on the site: `reference/index-build.md`."""
    return f"reference/{command.replace(' ', '-')}.md"


def command_pages() -> dict[str, str]:
    """The pages of all commands, by where they lie."""
    return {page_name(name): command_page(name) for name in COMMANDS}


def command_table(folder: str = "reference") -> str:
    """A table of all commands, each with a link to its page; `folder` is where these lie, seen from the table."""
    lines = ["| command | does |", "|---|---|"]
    for name, command in COMMANDS.items():
        target = f"{folder}/{page_name(name).rpartition('/')[2]}"
        lines.append(f"| [`raytower {name}`]({target}) | {_cell(command.help)} |")
    for name, about in ABOUT.items():
        lines.append(f"| `raytower {name} {about.takes.partition(' ')[0]}` | {_cell(about.help)} |")
    return "\n".join(lines)


def command_page(name: str) -> str:
    """What a command does, how it is written, and a table of keys for each of its sections."""
    command = COMMANDS[name]
    keys = list(keys_of(find_reference(command.config)))
    parts = [f"# raytower {name}", f"{command.help[0].upper()}{command.help[1:]}."]
    if command.example:
        parts.append(_fence("sh", f"raytower {name} {command.example}"))
    if command.positions:
        positions = " and ".join(f"`{key}`" for key in command.positions)
        several = len(command.positions) > 1
        parts.append(
            f"{positions} may be given by {'their positions' if several else 'its position'}, without "
            f"{'their names' if several else 'its name'}."
        )
    if command.plan is not None:
        parts.append("`--dry-run` prints the whole config and the plan, and does nothing.")
    parts += _sections(keys)
    if name in EXAMPLES:
        parts += ["## A config to start from", f"`raytower config {name}` prints it."]
        parts.append(_fence("yaml", starting_config(name).rstrip("\n")))
    return "\n\n".join(parts) + "\n"


def _sections(keys: Sequence[Key]) -> Iterator[str]:
    """Tables of the keys: those of no section, then of each section those of its own."""
    yield "## Keys"
    yield _table([key for key in keys if "." not in key.path])
    for section in keys:
        if not section.is_section:
            continue
        yield f"## {section.path}"
        yield " ".join(_about_section(section))
        own = [key for key in keys if _parent(key) == section.path]
        shared = [key for key in own if key.chosen_by == section.chosen_by]
        if shared:
            yield _table(shared)
        for choice in section.choices:
            of_choice = [key for key in own if key.chosen_by == choice and key not in shared]
            if of_choice:
                yield f"### {section.path}: {choice}"
                yield f"With `name: {choice}`:"
                yield _table(of_choice)


def _about_section(section: Key) -> Iterator[str]:
    if section.meaning:
        yield section.meaning
    if section.chosen_by:
        yield f"With `name: {section.chosen_by}`."
    yield "Required." if section.default is None else f"Default: {_cell(section.default)}."
    if section.shorthand:
        short = section.name
        yield f"A single value, `{short}: VALUE`, means `{short}: {{{section.shorthand}: VALUE}}`."
    for other, name in section.aliases.items():
        yield f"`{other}` is another word for `{name}`."


def _table(keys: Sequence[Key]) -> str:
    lines = ["| key | takes | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        lines.append(f"| {_name(key)} | {_takes(key)} | {_default(key)} | {_cell(key.meaning)} |")
    return "\n".join(lines)


def _name(key: Key) -> str:
    """A key as it is written in its section, with an anchor by its whole path: `#target.recall`."""
    if key.is_section:
        return f"[`{key.name}`](#{slug(key.path)})"
    # Where a name chooses among several sets of keys, several of them may have a key of one name.
    path = f"{key.path}.{key.chosen_by}" if key.chosen_by else key.path
    return f'<a id="{path}"></a>`{key.name}`'


def _takes(key: Key) -> str:
    if key.is_section:
        return "its keys" + (f", or {_cell(key.shorthand)} alone" if key.shorthand else "")
    if key.choices:
        return ", ".join(f"`{choice}`" for choice in key.choices)
    unit = _UNITS.get(key.name.rpartition("_")[2]) if key.kind.startswith(("INT", "NUMBER")) else None
    unit = "bytes, with a unit" if key.kind.startswith("SIZE") else unit
    return _cell(key.kind) + (f" ({unit})" if unit else "")


def _default(key: Key) -> str:
    if key.default is None:
        return "required"
    return _cell(key.default) if key.is_section else f"`{_cell(key.default)}`"


def _parent(key: Key) -> str:
    return key.path.rpartition(".")[0]


def _cell(text: str) -> str:
    """A text in a cell of a table: `<tab>` is no tag, and a bar parts no cells."""
    outside = text.split("`")
    # Between backticks stands what is shown as it is.
    outside[::2] = [part.replace("<", "&lt;").replace("*", "\\*") for part in outside[::2]]
    return "`".join(outside).replace("|", "\\|")


def _fence(language: str, code: str) -> str:
    return f"```{language}\n{code}\n```"


def slug(heading: str) -> str:
    """A heading's anchor, by GitHub's rule: small letters, without punctuation, with dashes for spaces."""
    kept = "".join(c for c in heading.strip().lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")
