"""Several adapters from one factorization, and the options that ask for ranks."""

import json

import click
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from hf_callbacks import PosthocLoraCallback
from hf_callbacks.task import Task
from peft_posthoc import (
    AdapterError,
    Series,
    above_noise,
    budget,
    extract,
    fixed,
    keep_energy,
    keep_error,
    limited,
    several,
)
from peft_posthoc.cli.main import main
from peft_posthoc.cli.ranks import RANK, Asked, pattern_of
from peft_posthoc.extraction.request import Request
from peft_posthoc.linalg import svd
from peft_posthoc.linalg.spectrum import in_advance
from peft_posthoc.ranks.spelling import flags
from peft_posthoc.ranks.weighting import energy, relative


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def product(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        name: tensors[name.replace("lora_A", "lora_B")] @ a
        for name, a in tensors.items()
        if name.endswith("lora_A.weight")
    }


def test_several_ranks_come_from_one_factorization_at_the_cost_of_the_largest(llama_pair, tmp_path, monkeypatch):
    asked = []
    real = svd.truncated_svd

    def counted(delta, rank, **options):
        asked.append(in_advance(rank))
        return real(delta, rank, **options)

    monkeypatch.setattr("peft_posthoc.extraction.work.truncated_svd", counted)
    result = run("extract", *llama_pair, tmp_path / "out", "--rank", "4,16,8", "--json", tmp_path / "all.json")
    assert result.exit_code == 0, result.output
    assert asked == [16] * 14
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.json", "out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["r16", "r4", "r8"]
    assert [line.split()[0] for line in result.output.splitlines() if line.startswith("r")] == ["r4", "r16", "r8"]
    for rank in (4, 8, 16):
        monkeypatch.undo()
        alone = extract(*llama_pair, rank).save(tmp_path / f"alone-{rank}")
        for name, value in product(alone).items():
            assert torch.allclose(product(tmp_path / f"out/r{rank}")[name], value, atol=1e-5)
        told = json.loads((tmp_path / f"out/r{rank}/phlora_report.json").read_text())
        assert told["totals"]["rank"] == rank
        assert told["provenance"]["options"]["rule"] == f"fixed(rank={rank})"
        assert json.loads((tmp_path / "all.json").read_text())[f"r{rank}"]["totals"] == told["totals"]


@pytest.mark.parametrize(
    ("flags", "folders"),
    [
        (["--energy", "0.5, 0.9"], ["e0.5", "e0.9"]),
        (["--error", "0.1,0.6"], ["error0.1", "error0.6"]),
        (["--rank", "auto,2"], ["auto", "r2"]),
    ],
)
def test_several_shares_are_what_each_gives_alone(flags, folders, llama_pair, tmp_path):
    result = run("extract", *llama_pair, tmp_path / "out", *flags)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == folders
    for folder, value in zip(folders, flags[1].split(","), strict=True):
        assert run("extract", *llama_pair, tmp_path / f"alone-{folder}", flags[0], value.strip()).exit_code == 0
        ranks = [
            [row["rank"] for row in json.loads((path / "phlora_report.json").read_text())["rows"]]
            for path in (tmp_path / "out" / folder, tmp_path / f"alone-{folder}")
        ]
        assert ranks[0] == ranks[1]


def test_an_adapter_that_is_there_is_replaced_only_by_force(llama_pair, tmp_path):
    assert run("extract", *llama_pair, tmp_path / "out", "--rank", "2,4").exit_code == 0
    refused = run("extract", *llama_pair, tmp_path / "out", "--rank", "4,8")
    assert refused.exit_code == 1
    assert "r4` exists and is not empty" in refused.output
    assert not (tmp_path / "out/r8").exists()
    assert run("extract", *llama_pair, tmp_path / "out", "--rank", "4,8", "--force").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["r2", "r4", "r8"]


def test_an_adapter_gives_no_more_than_it_holds(llama_pair):
    adapter = extract(*llama_pair, 4)
    assert adapter.at(2).rank == 2
    with pytest.raises(ValueError, match=r"fixed\(rank=8\) asks for more than rank 4"):
        adapter.at(8)
    with pytest.raises(ValueError, match="asks for more than rank 4"):
        adapter.at(0.99)


def test_a_folder_within_is_whole_or_not_there(llama_pair, tmp_path):
    (tmp_path / "out/r4").mkdir(parents=True)
    (tmp_path / "out/r4/mine.txt").write_text("kept")
    rules = several((("r2", fixed(2)), ("r4", fixed(4))))
    found = Series.of(extract(*llama_pair, rules), rules)
    with pytest.raises(AdapterError):
        found.save(tmp_path / "out")
    assert not (tmp_path / "out/r2").exists()


# The rules.


def test_error_keeps_the_fewest_that_reach_it():
    from tests.make.spectrum import whole

    spectrum = whole([4.0, 3**0.5, 1.0])  # energies 16, 3, 1
    for error, rank in ((0.99, 1), (0.45, 1), (0.44, 2), (0.23, 2), (0.22, 3), (0.0, 3)):
        assert keep_error(error)(spectrum) == rank
    for wrong in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="A relative error must be"):
            keep_error(wrong)


def test_limits_bound_and_round_a_rules_answer():
    from tests.make.spectrum import whole

    spectrum = whole([1.0] * 40)
    assert limited(fixed(3), least=6)(spectrum) == 6
    assert limited(fixed(30), most=20)(spectrum) == 20
    assert limited(fixed(9), multiple=8)(spectrum) == 16
    assert limited(fixed(17), multiple=8, most=20)(spectrum) == 16
    assert limited(fixed(39), multiple=16)(spectrum) == 40  # all there are
    assert limited(keep_energy(0.5), most=4)(spectrum._replace(s=spectrum.s[:2])) == 3
    for wrong in ({"most": 0}, {"least": 0}, {"multiple": 0}, {"most": 4, "least": 5}, {"most": 4, "multiple": 8}):
        with pytest.raises(ValueError, match=r"least|most|multiple"):
            limited(fixed(1), **wrong)


def test_what_is_known_in_advance_is_factored_as_one_rank():
    assert in_advance(limited(fixed(9), multiple=8, most=100)) == 16
    assert in_advance(several((("a", fixed(3)), ("b", limited(fixed(7), least=9))))) == 9
    assert in_advance(several((("a", fixed(3)), ("b", keep_energy(0.5))))) is None
    assert in_advance(above_noise()) is None


def test_several_have_names_of_their_own():
    with pytest.raises(ValueError, match="`r8` is asked for twice"):
        several((("r8", fixed(8)), ("r8", fixed(8))))
    with pytest.raises(ValueError, match="none is given"):
        several(())


# The options.

RULES = [
    fixed(7),
    keep_energy(0.85),
    keep_error(0.25),
    above_noise(),
    limited(above_noise(), most=64, least=4, multiple=4),
    budget("64MB"),
    budget("2%", weighting=energy(), most=64),
    budget(params=10**6, weighting=relative(), least=4, multiple=8),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_rule_can_be_said_on_a_command_line(rule):
    heard = []

    @click.command()
    @RANK
    def command(rank):
        heard.append(rank.rule())

    assert CliRunner().invoke(command, flags(rule)).exit_code == 0
    assert heard == [rule]
    # And so handed to the process that works beside a trainer.
    assert Request.from_json(json.loads(json.dumps(Request.of(rule).to_json()))) == Request.of(rule)


def test_a_rule_that_no_option_says_stays_in_its_process():
    for rule in (lambda spectrum: 3, limited(lambda spectrum: 3, most=4), budget("1MB", weighting=lambda *_: 1.0)):
        with pytest.raises(ValueError, match="none that words are known for"):
            Request.of(rule).to_json()
        with pytest.raises(ValueError, match="background=False"):
            PosthocLoraCallback(rule)
    with pytest.raises(ValueError, match="Several are given"):
        PosthocLoraCallback(several((("r1", fixed(1)), ("r2", fixed(2)))))


def test_options_that_contradict_one_another_are_refused():
    for asked in ({"rank": "8", "budget": "1MB"}, {"error": "0.1", "params": 9}, {"energy": "0.9", "error": "0.1"}):
        with pytest.raises(click.UsageError, match="not both"):
            Asked(asked).rule()
    with pytest.raises(click.UsageError, match=r"weighting.* is one of budget"):
        Asked({"rank": "8", "weighting": "energy"}).rule()
    with pytest.raises(click.UsageError, match="must be one of uniform, energy, relative, balanced, early"):
        Asked({"budget": "1MB", "weighting": "mine"}).rule()
    assert Asked({}).rule() is None
    assert Asked({"max_rank": 8}).rule() == limited(fixed(32), most=8)


def test_a_rank_pattern_is_read_from_a_file(llama_pair, tmp_path):
    (tmp_path / "ranks.json").write_text('{"q_proj": 3, "layers\\\\.1\\\\.mlp\\\\.up_proj": 5}')
    asked = ["--rank", "2", "--rank-pattern", tmp_path / "ranks.json", "--form", "peft"]
    assert run("extract", *llama_pair, tmp_path / "out", *asked).exit_code == 0
    rows = json.loads((tmp_path / "out/phlora_report.json").read_text())["rows"]
    for row in rows:
        if row["status"] == "extracted":
            by_hand = 3 if "q_proj" in row["weight"] else 5 if "layers.1.mlp.up" in row["weight"] else 2
            assert row["rank"] == by_hand


def test_a_rank_pattern_that_matches_nothing_is_named(llama_pair, tmp_path):
    # The second is hidden by the first, and no mistake; the last means a module that is not carried.
    fine = {r".*_proj": 3, "q_proj": 5}
    assert extract(*llama_pair, 2, rank_pattern=fine).report.totals.rank == 3
    for pattern in ("q_prj", r"layers\.9\..*", "self_attn", "lm_head"):
        with pytest.raises(ValueError, match="ends the name of no module that is carried") as refused:
            extract(*llama_pair, 2, rank_pattern=fine | {pattern: 4})
        assert str(refused.value).startswith(f"`{pattern}` in `rank_pattern=...`")
        text = json.dumps({pattern: 4})
        done = run("extract", *llama_pair, tmp_path / "out", "--rank", "2", "--rank-pattern", text)
        assert (done.exit_code, list(tmp_path.iterdir())) == (2, [])
        assert f"`{pattern}` in `--rank-pattern` ends the name" in done.output


@pytest.mark.parametrize("text", ["[1]", "{}", '{"q_proj": 0}', '{"q_proj": 1.5}', '{"(": 4}', "{", "nowhere.json"])
def test_a_pattern_that_makes_no_sense_is_refused(text, tmp_path):
    with pytest.raises(click.BadParameter):
        pattern_of(text)


@pytest.mark.parametrize("flags", [["--budget", "40kB"], ["--params", "9000"], ["--rank", "auto"], ["--error", "0.5"]])
def test_the_command_and_python_give_the_same_ranks(flags, llama_pair, tmp_path):
    assert run("extract", *llama_pair, tmp_path / "out", *flags, "--form", "peft").exit_code == 0
    rows = json.loads((tmp_path / "out/phlora_report.json").read_text())["rows"]
    rule = {"--budget": budget("40kB"), "--params": budget(params=9000), "--rank": "auto", "--error": keep_error(0.5)}
    adapter = extract(*llama_pair, rule[flags[0]], form="peft")
    assert {row["weight"]: row["rank"] for row in rows if row["status"] == "extracted"} == {
        name: len(layer.factors.s) for name, layer in adapter.layers.items()
    }


@pytest.mark.parametrize("rule", [budget("60kB"), above_noise(), limited(keep_error(0.3), most=8)], ids=str)
def test_a_trainers_checkpoint_gets_the_rank_that_python_gives(rule, llama_pair, tmp_path):
    Task(*map(str, llama_pair), str(tmp_path / "out"), Request.of(rule).to_json()).run()
    told = json.loads((tmp_path / "out/phlora_report.json").read_text())["provenance"]["options"]["rule"]
    assert told == repr(rule)
    ranks = [
        row["rank"] for row in json.loads((tmp_path / "out/phlora_report.json").read_text())["rows"] if row["rank"]
    ]
    assert ranks == [len(layer.factors.s) for layer in extract(*llama_pair, rule).layers.values()]


def test_from_delta_takes_any_rule(llama_pair):
    from peft_posthoc import LoraConfig

    assert LoraConfig.from_delta(*llama_pair, r=budget("60kB")).r == extract(*llama_pair, budget("60kB")).rank
    assert LoraConfig.from_delta(*llama_pair, r=limited(keep_error(0.3), most=8)).r == 8
