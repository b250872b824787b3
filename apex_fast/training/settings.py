"""Typed settings: dataclasses filled from YAML files and the command line, with errors that name the right key.

A settings class is a dataclass whose fields carry their documentation in ``metadata["help"]`` (see :func:`setting`); a
field whose type is itself a dataclass is a section, reached as ``section: {key: value}`` in YAML and as ``--section.key
value`` on the command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from apex_fast.extras import require

T = TypeVar("T")


class SettingsError(ValueError):
    """A key or a value in a config file or on the command line that cannot be used; the message says what to write
    instead."""


def setting(default: Any = dataclasses.MISSING, *, help: str, group: str | None = None, factory: Any = None) -> Any:
    """A documented dataclass field. ``group`` starts a new heading in ``--help``; ``factory`` makes mutable
    defaults."""
    metadata = {"help": help, "group": group}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


# ---- types


def _describe(kind: Any) -> str:
    """``kind`` in words a user writes: 'a number', 'one of: no, bf16'."""
    if kind is Any:
        return "any value"
    if kind is type(None):
        return "null"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}
    if kind in names:
        return names[kind]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of: " + ", ".join(str(a) for a in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(a) for a in arguments)
    if origin in (list, tuple, Sequence):
        return f"a list ({_describe(arguments[0])} each)" if arguments else "a list"
    if origin is dict:
        return "a section of keys and values"
    if dataclasses.is_dataclass(kind):
        return "a section with the keys " + ", ".join(f.name for f in dataclasses.fields(kind))
    return getattr(kind, "__name__", str(kind))


def _show(value: Any) -> str:
    kind = {dict: "a section", list: "a list", str: "the text", bool: "the truth value", type(None): "null"}.get(
        type(value), "the number"
    )
    return kind if value is None else f"{kind} {value!r}"


class _Mismatch(Exception):
    pass


def _is_section(kind: Any) -> type | None:
    """The dataclass that a field's type stands for, also inside ``X | None``."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return kind
    if get_origin(kind) in (Union, types.UnionType):
        return next((s for a in get_args(kind) if (s := _is_section(a)) is not None), None)
    return None


def _convert(kind: Any, value: Any) -> Any:
    """``value`` as ``kind``; raises _Mismatch. Only lossless changes: a whole number for a number, a list for a
    tuple."""
    if kind is Any:
        return value
    if kind is type(None):
        if value is None:
            return None
        raise _Mismatch
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        # Exact types first: 3 stays a whole number where both are allowed.
        for choice in sorted(arguments, key=lambda a: a is not type(value)):
            try:
                return _convert(choice, value)
            except _Mismatch:
                continue
        raise _Mismatch
    if origin is Literal:
        for choice in arguments:
            if type(choice) is type(value) and choice == value:
                return choice
        raise _Mismatch
    if origin in (list, tuple, Sequence):
        if not isinstance(value, (list, tuple)):
            raise _Mismatch
        if origin is tuple and arguments and arguments[-1] is not Ellipsis:
            if len(value) != len(arguments):
                raise _Mismatch
            return tuple(_convert(a, v) for a, v in zip(arguments, value, strict=True))
        items = [_convert(arguments[0] if arguments else Any, v) for v in value]
        return tuple(items) if origin is tuple else items
    if origin is dict:
        if isinstance(value, Mapping):
            return dict(value)
        raise _Mismatch
    if kind is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        raise _Mismatch
    if kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise _Mismatch
    if kind is Path and isinstance(value, (str, Path)):
        return Path(value)
    if isinstance(kind, type) and isinstance(value, kind):
        return value
    raise _Mismatch


# ---- keys


def argument_docs(cls: type) -> dict[str, str]:
    """The text of each name in the ``Args:`` part of a docstring ("low, high: range ..." counts for both)."""
    docs: dict[str, str] = {}
    names: list[str] = []
    inside = False
    for line in (cls.__doc__ or "").splitlines():
        text = line.strip()
        if text in ("Args:", "Attributes:", "Fields:"):
            inside = True
            continue
        if not inside:
            continue
        if text in ("Raises:", "Returns:", "Example:"):
            break
        head, colon, tail = text.partition(": ")
        if not colon and text.endswith(":"):
            head, colon, tail = text[:-1], ":", ""
        candidates = [n.strip() for n in head.split(",")]
        if colon and all(n.isidentifier() for n in candidates):
            names = candidates
            for name in names:
                docs[name] = tail
        elif text:
            for name in names:
                docs[name] = f"{docs[name]} {text}".strip()
    return docs


def keys_of(cls: type, prefix: str = "") -> dict[str, tuple[Any, dataclasses.Field]]:
    """Every key of a settings class, sections included, as ``{"section.key": (type, field)}``."""
    hints = typing.get_type_hints(cls)
    found: dict[str, tuple[Any, dataclasses.Field]] = {}
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        section = _is_section(hints[field.name])
        if section is not None:
            found.update(keys_of(section, f"{prefix}{field.name}."))
        else:
            found[prefix + field.name] = (hints[field.name], field)
    return found


def _unknown(cls: type, name: str, source: str, foreign: Mapping[str, str]) -> SettingsError:
    keys = keys_of(cls)
    leaf = name.rsplit(".", 1)[-1]
    for spelling in (name, leaf):
        if spelling in foreign:
            return SettingsError(f"{source}: unknown key {name!r}: {foreign[spelling]}")
    sections = {k.rsplit(".", 1)[0] for k in keys if "." in k}
    if name in sections:
        return SettingsError(
            f"{source}: {name!r} is a section; write one of its keys: "
            + ", ".join(k for k in keys if k.startswith(name + "."))
        )
    near = difflib.get_close_matches(name, list(keys), n=1, cutoff=0.75)
    if not near:
        # A right key at the wrong level, or misspelt there.
        leaves: dict[str, str] = {}
        for key in keys:
            leaves.setdefault(key.rsplit(".", 1)[-1], key)
        near = [leaves[n] for n in difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.7)]
    if not near and "." not in name:
        near = difflib.get_close_matches(name, list(keys), n=1, cutoff=0.55)
    hint = f"did you mean {near[0]!r}?" if near else "`apex-fast train --help` lists all keys."
    return SettingsError(f"{source}: unknown key {name!r}: {hint}")


def check(
    cls: type, values: Mapping[str, Any], *, source: str, foreign: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """``values`` with every leaf converted to its field's type; what is missing stays missing.

    ``source`` begins every error; ``foreign`` maps other trainers' keys to what to write here.

    Raises:
        SettingsError: an unknown key (with the nearest known one) or a value of the wrong type.
    """
    return _check(cls, cls, values, "", source, foreign or {})


def _check(
    root: type, cls: type, values: Mapping[str, Any], prefix: str, source: str, foreign: Mapping[str, str]
) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls) if f.init}
    checked: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in known:
            raise _unknown(root, name, source, foreign)
        section = _is_section(hints[key])
        if section is not None and isinstance(value, Mapping):
            checked[key] = _check(root, section, value, name + ".", source, foreign)
            continue
        try:
            checked[key] = _convert(hints[key], value)
        except _Mismatch:
            raise SettingsError(f"{source}: {name} must be {_describe(hints[key])}, got {_show(value)}") from None
    return checked


def build(cls: type[T], values: Mapping[str, Any], *, source: str, foreign: Mapping[str, str] | None = None) -> T:
    """A ``cls`` from nested ``values``, checked as :func:`check` does.

    Raises:
        SettingsError: also for a missing key, and for what ``cls`` itself refuses.
    """
    return _build(cls, check(cls, values, source=source, foreign=foreign), "", source)


def _build(cls: type, values: Mapping[str, Any], prefix: str, source: str) -> Any:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.init and required and field.name not in values:
            raise SettingsError(f"{source}: {prefix}{field.name} is required ({_describe(hints[field.name])})")
    arguments = dict(values)
    for field in dataclasses.fields(cls):
        section = _is_section(hints[field.name])
        if section is not None and isinstance(values.get(field.name), Mapping):
            # What a section leaves out keeps the default of this field, which may differ from the section's own.
            default = _default(field)
            below = as_mapping(default) if isinstance(default, section) else {}
            arguments[field.name] = _build(section, merge(below, values[field.name]), f"{prefix}{field.name}.", source)
    try:
        return cls(**arguments)
    except SettingsError as error:
        raise SettingsError(f"{source}: {error}") from None
    except (ValueError, TypeError) as error:
        where = f"{prefix[:-1]}: " if prefix else ""
        raise SettingsError(f"{source}: {where}{error}") from error


def as_mapping(settings: Any) -> dict[str, Any]:
    """The inverse of :func:`build`: nested plain values that YAML and JSON can hold."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return plain(settings)


def differences(
    before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "", *, leave_out: Sequence[str] = ()
) -> list[str]:
    """Where two nested mappings differ, as "key old -> new"; keys that ``before`` did not have yet are no
    difference."""
    found: list[str] = []
    for key, value in after.items():
        old, name = before.get(key), f"{prefix}{key}"
        if name in leave_out or old == value or key not in before:
            continue
        if isinstance(value, dict) and isinstance(old, dict):
            found += differences(old, value, f"{name}.")
        else:
            found.append(f"{name} {old} -> {value}")
    return found


# ---- YAML


def _loader() -> Any:
    yaml = require("yaml", extra="train")

    class Loader(yaml.SafeLoader):
        """YAML as people write it: 1e-4 is a number, `no` is a word, and a key may stand only once."""

    # YAML 1.1 reads "1e-4" as a text and "no"/"on" as truth values: both would surprise in `learning_rate` and
    # `mixed_precision`.
    replaced = ("tag:yaml.org,2002:float", "tag:yaml.org,2002:bool")
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in replaced]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    import re

    Loader.add_implicit_resolver(replaced[1], re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
    exponent = r"[eE][-+]?[0-9]+"
    number = (
        rf"^[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:{exponent})?|[0-9][0-9_]*{exponent}"
        r"|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    )
    Loader.add_implicit_resolver(replaced[0], re.compile(number), list("-+0123456789."))

    def mapping(loader: Any, node: Any, deep: bool = False) -> dict[str, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = loader.construct_object(key_node, deep=True)
            if key in seen:
                raise SettingsError(
                    f"line {key_node.start_mark.line + 1}: the key {key!r} stands there twice; keep one"
                )
            seen.add(key)
        return loader.construct_mapping(node, deep)

    Loader.add_constructor(
        yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, lambda loader, node: mapping(loader, node, deep=True)
    )
    return Loader


def parse_yaml(text: str, *, source: str) -> Any:
    """``text`` as plain values (safe: no objects are made). Raises SettingsError with the line of a mistake."""
    yaml = require("yaml", extra="train")
    try:
        # A subclass of SafeLoader: it makes plain values only.
        return yaml.load(text, Loader=_loader())
    except SettingsError as error:
        raise SettingsError(f"{source}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        raise SettingsError(f"{source}: not valid YAML{where}: {getattr(error, 'problem', None) or error}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises SettingsError when there is no such file or it holds no mapping."""
    path = Path(path)
    if not path.is_file():
        raise SettingsError(f"{path}: no such config file")
    values = parse_yaml(path.read_text(encoding="utf-8"), source=str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: a config file holds `key: value` lines, got {_show(values)}")
    return values


def write_yaml(path: Path, values: Mapping[str, Any], *, leave_out: Sequence[str] = ()) -> None:
    """Writes plain values so that :func:`read_yaml` gives them back."""
    yaml = require("yaml", extra="train")
    kept = {k: v for k, v in values.items() if k not in leave_out}

    class Dumper(yaml.SafeDumper):
        pass

    # Every value in full: an alias (&id001) is no way to write a list of prompts.
    Dumper.ignore_aliases = lambda self, data: True
    path.write_text(yaml.dump(kept, Dumper=Dumper, sort_keys=False, allow_unicode=True), encoding="utf-8")


# ---- command line


def _flag_value(kind: Any, texts: list[str], name: str) -> Any:
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    origins = {get_origin(o) for o in options}
    if origins & {list, tuple, Sequence}:
        if len(texts) == 1 and (texts[0].strip().startswith("[") or texts[0].strip() in ("null", "none")):
            return parse_yaml(texts[0].replace("none", "null"), source=f"--{name}")
        if not texts and bool in options:
            return True
        if len(texts) == 1 and {bool, int, float} & set(options):
            one = parse_yaml(texts[0], source=f"--{name}")
            if isinstance(one, (bool, int, float)):
                return one
        inner = next(o for o in options if get_origin(o) in (list, tuple, Sequence))
        element = (get_args(inner) or (Any,))[0]
        return [_flag_value(element, [t], name) for t in texts]
    if not texts:
        if bool in options:
            return True
        raise SettingsError(f"--{name} needs a value: {_describe(kind)}")
    if len(texts) > 1:
        raise SettingsError(
            f"--{name} takes one value ({_describe(kind)}), got {' '.join(texts)!r}; put quotes around a text with "
            "spaces"
        )
    text = texts[0]
    if type(None) in options and text.lower() in ("null", "none"):
        return None
    if all(o in (str, Path, type(None)) for o in options):
        return text
    if any(get_origin(o) is Literal and text in get_args(o) for o in options):
        return text
    return parse_yaml(text, source=f"--{name}")


def parse_overrides(cls: type, arguments: Sequence[str], *, foreign: Mapping[str, str] | None = None) -> dict[str, Any]:
    """``--key value`` pairs as nested values for :func:`build`. ``--learning_rate`` and ``--learning-rate`` are the
    same key, ``--key=value`` works, ``--section.key`` reaches into a section, a truth value alone means true, a list
    takes several values."""
    keys = keys_of(cls)
    result: dict[str, Any] = {}
    position = 0
    while position < len(arguments):
        word = arguments[position]
        position += 1
        if not word.startswith("--") or word == "--":
            raise SettingsError(f"command line: expected --key, got {word!r}; put quotes around a text with spaces")
        name, equals, attached = word[2:].partition("=")
        name = name.replace("-", "_")
        texts = [attached] if equals else []
        while not equals and position < len(arguments) and not arguments[position].startswith("--"):
            texts.append(arguments[position])
            position += 1
        if name not in keys:
            raise _unknown(cls, name, "command line", foreign or {})
        target = result
        *sections, leaf = name.split(".")
        for section in sections:
            target = target.setdefault(section, {})
        if leaf in target:
            raise SettingsError(f"command line: --{name} stands there twice; keep one")
        target[leaf] = _flag_value(keys[name][0], texts, name)
    return result


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``over`` on top, section by section."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def help_text(cls: type, *, width: int = 110) -> str:
    """All keys of ``cls`` with type, default and documentation, in the order of the file, for ``--help``."""
    import textwrap

    lines: list[str] = []
    seen: dict[type, str] = {}

    def visit(kind: type, prefix: str, defaults: Any) -> None:
        hints, docs = typing.get_type_hints(kind), argument_docs(kind)
        for field in dataclasses.fields(kind):
            if not field.init:
                continue
            name = prefix + field.name
            text = field.metadata.get("help") or docs.get(field.name, "")
            text = text.replace("``", "")
            if (group := field.metadata.get("group")) is not None:
                lines.append(f"\n{group}:")
            value = getattr(defaults, field.name, None) if defaults is not None else _default(field)
            section = _is_section(hints[field.name])
            if section is not None:
                if text:
                    lines.extend(
                        textwrap.wrap(f"{name}: {text}", width, initial_indent="  ", subsequent_indent="      ")
                    )
                if section in seen:
                    keys = ", ".join(
                        f"--{name}.{f.name} {_show_default(getattr(value, f.name, None))}"
                        for f in dataclasses.fields(section)
                    )
                    lines.extend(
                        textwrap.wrap(
                            f"{keys} (as in {seen[section]})",
                            width,
                            initial_indent="  ",
                            subsequent_indent="      ",
                            break_on_hyphens=False,
                        )
                    )
                    continue
                seen[section] = name
                visit(section, name + ".", value)
                continue
            lines.append(f"  --{name}  ({_describe(hints[field.name])}; default {_show_default(value)})")
            lines.extend(textwrap.wrap(text, width, initial_indent="      ", subsequent_indent="      "))

    visit(cls, "", None)
    return "\n".join(lines).strip("\n")


def _default(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else "required"


def _show_default(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
