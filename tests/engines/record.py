"""What the engines did, kept in `outcomes.json`: `record` runs them, `kept` reads it."""

import datetime
import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peft_posthoc import check
from tests.engines import subjects
from tests.engines.running import ENGINES, Engine, Run, difference, run
from tests.make import models, wrong_adapters

KEPT = Path(__file__).with_name("outcomes.json")


def kept() -> dict[str, Any]:
    """By engine, what it did when it was last run."""
    return json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}


def record(names: list[str]) -> dict[str, Any]:
    """Run the engines of these names; what the others did is left as it is kept."""
    outcomes = kept()
    with tempfile.TemporaryDirectory() as folder:
        right = {name: Right(name, Path(folder)) for name in subjects.BASES}
        spoiled = {name: Spoiled(name, Path(folder)) for name in subjects.SPOILED_BASES}
        for name in names:
            engine = ENGINES[name]
            print(engine.title, flush=True)
            bases = {base: made.by(engine) for base, made in right.items() if base in bases_of(engine)}
            (versions,) = {tuple(one.pop("versions").items()) for one in bases.values()}
            today = datetime.date.today().isoformat()
            outcomes[name] = {"date": today, "versions": dict(versions), "right": bases}
            if engine.rules is not None:
                found = (made.by(engine) for made in spoiled.values())
                outcomes[name]["spoiled"] = {case: what for one in found for case, what in one.items()}
        said = {name: said_of(name, right, spoiled) for name in outcomes if ENGINES[name].rules is not None}
        for name, (of_right, of_spoiled) in said.items():
            for base, verdicts in of_right.items():
                for what, verdict in verdicts.items():
                    outcomes[name]["right"][base]["adapters"][what]["check"] = verdict
            for case, verdict in of_spoiled.items():
                outcomes[name]["spoiled"][case]["check"] = verdict
    KEPT.write_text(json.dumps({name: outcomes[name] for name in ENGINES if name in outcomes}, indent=1) + "\n")
    return outcomes


def said_of(
    name: str, right: Mapping[str, "Right"], spoiled: Mapping[str, "Spoiled"]
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """What `check` says of all the adapters for an engine: by base and adapter, and by case."""
    rules = ENGINES[name].rules
    assert rules is not None

    def verdict(adapter: Path, base: Path) -> str:
        return check(adapter, engines=[rules], base=base).outcomes[0].verdict

    of_right = {
        base: {what: verdict(adapter, made.pair.base) for what, adapter in (made.adapters | made.wrong).items()}
        for base, made in right.items()
        if base in bases_of(ENGINES[name])
    }
    of_spoiled = {
        case: verdict(adapter, made.pair.base) for made in spoiled.values() for case, adapter in made.adapters.items()
    }
    return of_right, of_spoiled


def bases_of(engine: Engine) -> list[str]:
    """Those of `subjects.BASES` that it runs."""
    return [base for base in subjects.BASES if engine.mixtures or base not in subjects.MIXTURES]


class Right:
    """A base, adapters of its fine-tune as `phlora extract` writes them, and these spoiled on purpose."""

    def __init__(self, name: str, folder: Path) -> None:
        self.pair = subjects.save_pair(subjects.BASES[name], folder / name)
        self.base = subjects.next_token(models.load(self.pair.base))
        self.tuned = subjects.next_token(models.load(self.pair.tuned))
        self.adapters = subjects.right_adapters(self.pair, folder / name)
        self.wrong = subjects.spoiled_adapters(self.adapters["full rank"], folder / name / "wrong")
        self.held = {
            what: subjects.next_token(models.load(subjects.held(self.pair, adapter, folder / name / f"held {what}")))
            for what, adapter in self.adapters.items()
        }
        self.in_peft = {
            what: subjects.next_token(subjects.by_peft(adapter, self.pair.base))
            for what, adapter in self.adapters.items()
        }

    def by(self, engine: Engine) -> dict[str, Any]:
        """What an engine makes of them."""
        mixed = [(what, number) for number, what in enumerate(2 * [*list(self.adapters)[:2], None])]
        ran = run(engine, self.pair.base, self.adapters | self.wrong, subjects.prompts(), mixed=mixed)
        wanted = self.in_peft | dict.fromkeys(self.wrong, self.in_peft["full rank"])
        found = {what: _told(ran, what, wanted[what], self.base) for what in (*self.adapters, *self.wrong)}
        for what, held in self.held.items():
            if not isinstance(ran.adapters[what], str):
                found[what] |= {"from_tuned": difference(ran.adapters[what], held)}
        apart = difference(self.tuned, self.base)
        told: dict[str, Any] = {
            "apart": apart,
            "versions": ran.versions,
            "base": difference(ran.base, self.base),
            "adapters": found,
        }
        if isinstance(ran.mixed, str):
            told["mixed"] = _words(ran.mixed)
        elif ran.mixed is not None:
            alone = [(self.base if what is None else self.in_peft[what])[number] for what, number in mixed]
            told["mixed"] = difference(ran.mixed, np.stack(alone))
        return told


class Spoiled:
    """A base, and for every rule about it the adapter that breaks it."""

    def __init__(self, name: str, folder: Path) -> None:
        where = folder / f"spoiled-{name}"
        self.pair = subjects.save_pair(subjects.SPOILED_BASES[name], where)
        good = subjects.extract(*self.pair, wrong_adapters.RANK).save(where / "good")
        cases = {what: case for what, case in subjects.SPOILED.items() if (case.base or "llama") == name}
        made = {what: wrong_adapters.make(case, good, where / what) for what, case in cases.items()}
        # Several rules are about one and the same adapter: it stands for them under the first one's name.
        first: dict[bytes, str] = {}
        for what, adapter in made.items():
            first.setdefault(_content(adapter), what)
        self.adapters = {what: made[what] for what in first.values()}
        self.base = subjects.next_token(models.load(self.pair.base))
        self.meant = {
            what: subjects.next_token(subjects.meant(adapter, self.pair.base, good))
            for what, adapter in self.adapters.items()
        }

    def by(self, engine: Engine) -> dict[str, Any]:
        """What an engine makes of them."""
        ran = run(engine, self.pair.base, self.adapters, subjects.prompts())
        return {what: _told(ran, what, wanted, self.base) for what, wanted in self.meant.items()}


def _content(adapter: Path) -> bytes:
    digest = hashlib.sha256()
    for file in sorted(adapter.iterdir()):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.digest()


def rounding(own: float) -> float:
    """What an adapter may add to the difference that an engine has with transformers without one."""
    return 1e-4 + 3 * own


def _told(ran: Run, what: str, wanted: np.ndarray, base: np.ndarray) -> dict[str, Any]:
    found, most = ran.adapters[what], rounding(difference(ran.base, base))
    if isinstance(found, str):
        return {"verdict": "refused", "said": _words(found)}
    told = {"verdict": "right", "difference": difference(found, wanted)}
    if what in ran.beside:
        told["beside"] = difference(ran.beside[what], ran.base)
    if max(told["difference"], told.get("beside", 0)) > most:
        told["verdict"] = "silently wrong"
    return told


def _words(said: str) -> str:
    """Without folders of this machine, and sets, which have another order every time."""
    return re.sub(r"\{[^{}]*\}?", "{...}", re.sub(r"/\S*/", "", said))[:200]
