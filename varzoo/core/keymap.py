"""KeyMap: a declarative, bijective map between an official state dict and ours.

    key_map = KeyMap([
        Rename("layers.{i}.ffn.w1.weight", "blocks.{i}.mlp.gate.weight"),
        Rename("norm.{rest*}", "final_norm.{rest*}"),
        Split("layers.{i}.attn.in_proj.weight", ["blocks.{i}.q.weight", "blocks.{i}.k.weight", "blocks.{i}.v.weight"]),
        Alias("lins.{i}.weight", of="lin{i}.weight"),
        Ignore("freqs_cis"),
    ])
    model.load_state_dict(key_map.to_ours(official))    # strict
    official = key_map.to_official(model.state_dict())

A template's `{name}` stands for one dot-free part of a key, `{name*}` for any rest. The first rule that matches a key
is the one that applies; a key that no rule matches is an error that names it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

State = dict[str, Tensor]


def _match(template: str, key: str) -> dict[str, str] | None:
    """The placeholders' values if `key` has the template's form, else None."""
    pattern, seen = "", set()
    for part in re.split(r"(\{\w+\*?\})", template):
        if not part.startswith("{"):
            pattern += re.escape(part)
            continue
        name = part.strip("{}*")
        pattern += f"(?P={name})" if name in seen else f"(?P<{name}>{'.+' if '*' in part else '[^.]+'})"
        seen.add(name)
    found = re.fullmatch(pattern, key)
    return found.groupdict() if found else None


def _fill(template: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\*?\}", lambda match: values[match[1]], template)


class Rule(ABC):
    """One line of a key map. `take(key, state)` consumes `key` and what belongs to it, and returns what it becomes."""

    @abstractmethod
    def to_ours(self, key: str, state: State) -> State | None:
        """Translate an official key, popping every tensor used from `state`; None if the rule does not match."""

    @abstractmethod
    def to_official(self, key: str, state: State) -> State | None:
        """The way back."""


@dataclass(frozen=True)
class Rename(Rule):
    """One tensor under another name; `convert` and `revert` change its values or shape on the way."""

    official: str
    ours: str
    convert: Callable[[Tensor], Tensor] | None = None
    revert: Callable[[Tensor], Tensor] | None = None

    def to_ours(self, key: str, state: State) -> State | None:
        return self._move(key, state, self.official, self.ours, self.convert)

    def to_official(self, key: str, state: State) -> State | None:
        return self._move(key, state, self.ours, self.official, self.revert)

    @staticmethod
    def _move(key: str, state: State, source: str, target: str,
              change: Callable[[Tensor], Tensor] | None) -> State | None:
        values = _match(source, key)
        if values is None:
            return None
        tensor = state.pop(key)
        return {_fill(target, values): change(tensor) if change else tensor}


@dataclass(frozen=True)
class Split(Rule):
    """One official tensor that is several of ours, stacked along the first axis in equal parts (q, k, v)."""

    official: str
    ours: Sequence[str]

    def to_ours(self, key: str, state: State) -> State | None:
        values = _match(self.official, key)
        if values is None:
            return None
        parts = state.pop(key).chunk(len(self.ours))
        return {_fill(name, values): part.clone() for name, part in zip(self.ours, parts)}

    def to_official(self, key: str, state: State) -> State | None:
        # Whichever part comes first: files keep their keys in any order.
        values = next((found for name in self.ours if (found := _match(name, key)) is not None), None)
        if values is None:
            return None
        names = [_fill(name, values) for name in self.ours]
        if any(name not in state for name in names):
            return None
        return {_fill(self.official, values): torch.cat([state.pop(name) for name in names])}


@dataclass(frozen=True)
class Concat(Rule):
    """Several official tensors that are one of ours, stacked along the first axis in equal parts."""

    official: Sequence[str]
    ours: str

    def to_ours(self, key: str, state: State) -> State | None:
        return Split(self.ours, self.official).to_official(key, state)

    def to_official(self, key: str, state: State) -> State | None:
        return Split(self.ours, self.official).to_ours(key, state)


@dataclass(frozen=True)
class Alias(Rule):
    """A second official name of a tensor; the official `of` name is mapped by another rule. The two must be equal."""

    official: str
    of: str

    def to_ours(self, key: str, state: State) -> State | None:
        values = _match(self.official, key)
        if values is None:
            return None
        name = _fill(self.of, values)
        tensor, first = state.pop(key), state.get(name)
        if first is not None and not torch.equal(tensor, first):
            raise ValueError(f"{key} should equal {name}, of which it is a second name, but does not.")
        return {}

    def to_official(self, key: str, state: State) -> State | None:
        return None


@dataclass(frozen=True)
class Ignore(Rule):
    """Official keys that carry nothing of ours. With `constant`, the way back writes `constant()` again."""

    official: str
    constant: Callable[[], Tensor] | None = None

    def to_ours(self, key: str, state: State) -> State | None:
        if _match(self.official, key) is None:
            return None
        state.pop(key)
        return {}

    def to_official(self, key: str, state: State) -> State | None:
        return None


@dataclass(frozen=True)
class Computed(Rule):
    """An official tensor that our model computes; a file's must be equal, and the way back writes it again."""

    official: str
    value: Callable[[], Tensor]

    def to_ours(self, key: str, state: State) -> State | None:
        if _match(self.official, key) is None:
            return None
        theirs, ours = state.pop(key), self.value()
        if theirs.shape != ours.shape or not torch.allclose(theirs.float(), ours.float().to(theirs.device), atol=1e-3):
            raise ValueError(f"{key} {tuple(theirs.shape)} is not the table {tuple(ours.shape)} that this model "
                             "computes; choose the config that the file was made with.")
        return {}

    def to_official(self, key: str, state: State) -> State | None:
        return None


class KeyMap:
    """Rules between one official layout and ours.

    Args:
        rules: in order of precedence.
        prefixes: prefixes that wrappers put before every key ("_orig_mod.", "module."), stripped where present.
        inside: what our names begin with where the model is a part of another ("vae."); the rules do without.
    """

    def __init__(self, rules: Sequence[Rule], prefixes: Sequence[str] = ("_orig_mod.", "module."),
                 inside: str = "") -> None:
        self.rules, self.prefixes, self.inside = list(rules), tuple(prefixes), inside

    def within(self, part: str) -> KeyMap:
        """The same layout for a model that holds this one as `part`."""
        return KeyMap(self.rules, self.prefixes, f"{part}.{self.inside}")

    def to_ours(self, official: Mapping[str, Tensor]) -> State:
        """Translate an official state dict. Raises ValueError naming the keys that no rule matches."""
        state = dict(official)
        for prefix in self.prefixes:
            if state and all(key.startswith(prefix) for key in state):
                state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
        # Aliases are compared with the tensor they name, so they go first.
        aliases = [rule for rule in self.rules if isinstance(rule, Alias)]
        for key in list(state):
            next((rule for rule in aliases if rule.to_ours(key, state) is not None), None)
        ours = self._translate(state, "to_ours", "official checkpoint")
        return {self.inside + name: tensor for name, tensor in ours.items()}

    def to_official(self, ours: Mapping[str, Tensor]) -> State:
        """Translate our state dict back; aliases and constants are written again."""
        state = {name.removeprefix(self.inside): tensor for name, tensor in ours.items()}
        official = self._translate(state, "to_official", "state dict")
        for rule in self.rules:
            if isinstance(rule, Alias):
                matches = {key: _match(rule.of, key) for key in official}
                official |= {_fill(rule.official, values): official[key] for key, values in matches.items()
                             if values is not None}
            elif isinstance(rule, Ignore) and rule.constant is not None:
                official[rule.official] = rule.constant()
            elif isinstance(rule, Computed):
                official[rule.official] = rule.value()
        return official

    def _translate(self, state: State, direction: str, what: str) -> State:
        result: State = {}
        unmatched = []
        for key in list(state):
            if key not in state:  # taken together with an earlier key
                continue
            for rule in self.rules:
                translated = getattr(rule, direction)(key, state)
                if translated is not None:
                    result |= translated
                    break
            else:
                unmatched.append(key)
        if unmatched:
            more = f" and {len(unmatched) - 5} more" if len(unmatched) > 5 else ""
            raise ValueError(
                f"the {what} has keys this model does not know: {', '.join(unmatched[:5])}{more}. "
                "It belongs to another architecture or another size."
            )
        return result
