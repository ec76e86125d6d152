from __future__ import annotations

import math
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from varzoo.core.checkpoint import load_strictly, read_config, read_weights, save_weights
from varzoo.core.draws import Draws, Recorded, RecordedDraws, _philox
from varzoo.core.keymap import Alias, Concat, Ignore, KeyMap, Rename, Split
from varzoo.core.spec import TokenSpec, require_same_tokens
from varzoo.core.steps import Constant, LinearInTokens, Step, needs_null_branch
from varzoo.predictions.categorical import Categorical, inverse_cdf
from varzoo.tokenizers.base import to_uint8


@pytest.mark.parametrize(("word", "expected"), [
    (0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (0xFFFFFFFF, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD])])
def test_philox_known_answers(word: int, expected: list[int]) -> None:
    """The known-answer vectors of the Random123 library."""
    counter = [torch.tensor([word])] * 4
    assert [int(value) for value in _philox(counter, (word, word))] == expected


def test_a_draw_is_a_function_of_seed_sample_name_keys_and_position() -> None:
    draws = Draws(7, (0, 5, 2**33))
    at = torch.tensor([[0, 1], [3, 0], [1, 2]])
    noise = draws.normal("noise", (4,), at=at, k=3)
    alone = Draws(7, (5,)).normal("noise", (4,), at=torch.tensor([[9, 3]]), k=3)
    assert torch.equal(noise[1, 0], alone[0, 1])
    others = [Draws(8, (5,)), Draws(7 + 2**32, (5,)), Draws(7, (6,)), Draws(7, (5 + 2**32,)),
              Draws(7, (5,)).keyed(iteration=1)]
    different = [other.normal("noise", (4,), at=at[1:2], k=3) for other in others]
    same = Draws(7, (5,))
    different += [same.normal("other", (4,), at=at[1:2], k=3), same.normal("noise", (4,), at=at[1:2], k=4),
                  same.normal("noise", (4,), at=at[1:2] + 1, k=3)]
    assert len({tuple(tensor.flatten().tolist()) for tensor in [noise[1:2], *different]}) == 9
    assert torch.equal(draws.rows([2]).uniform("u"), draws.uniform("u")[2:])
    assert torch.equal(Draws(7, (1, 2)).shared.uniform("rate"), Draws(7, (3,)).shared.uniform("rate"))


def test_draws_have_their_distributions() -> None:
    draws = Draws(1, (0,))
    normal = draws.normal("n", (200_000,))[0].double()
    assert abs(normal.mean()) < 0.01 and abs(normal.std() - 1) < 0.01 and abs((normal**4).mean() - 3) < 0.1
    uniform = draws.uniform("u", (200_000,))[0]
    assert uniform.min() >= 0 and uniform.max() < 1
    counts = draws.integers("i", 10, (200_000,))[0].bincount(minlength=10).double()
    assert ((counts - 20_000) ** 2 / 20_000).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001
    gumbel = draws.gumbel("g", (200_000,))[0]
    assert abs(gumbel.mean() - 0.5772) < 0.01
    truncated = draws.truncated_normal("t", (200_000,), mean=1.0, std=0.25, low=0.7, high=1.0)[0]
    assert truncated.min() >= 0.7 and truncated.max() <= 1.0
    low = -0.3 / 0.25
    expected = 1 + 0.25 * (math.exp(-low**2 / 2) - 1) / math.sqrt(2 * math.pi) / (0.5 - 0.5 * math.erfc(-low / 2**0.5))
    assert abs(truncated.mean() - expected) < 2e-3
    orders = Draws(1, range(6000)).permutation("o", 3)
    assert (orders.sort(dim=1).values == torch.arange(3)).all()
    counts = (orders[:, 0] * 3 + orders[:, 1]).bincount(minlength=9).double()
    counts = counts[counts > 0]
    assert len(counts) == 6 and ((counts - 1000) ** 2 / 1000).sum() < 20.5  # 5 degrees of freedom, p = 0.001


def test_recorded_draws_replay_by_axes() -> None:
    array = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).float()
    draws = RecordedDraws({"noise": Recorded(array, "k batch pos"), "drop": Recorded(torch.tensor([True, False, True]),
                                                                                    "batch")}, (0, 1, 2))
    at = torch.tensor([[0, 2], [1, 1], [3, 0]])
    noise = draws.normal("noise", (5,), at=at, k=1)
    assert noise.shape == (3, 2, 5) and torch.equal(noise[2, 0], array[1, 2, 3])
    assert ((draws.uniform("drop") < 0.5) == torch.tensor([True, False, True])).all()
    with pytest.raises(ValueError, match="no draws were recorded for stream 'u'"):
        draws.uniform("u")


def test_specs_combine_only_if_equal() -> None:
    grid = TokenSpec(kind="discrete", shape=[8, 8], size=128)
    require_same_tokens(grid, TokenSpec(kind="discrete", shape=(8, 8), size=128))
    with pytest.raises(ValueError, match=r"discrete grid 8 x 8 of 128 codes.*continuous sequence 64 of 4 channels"):
        require_same_tokens(grid, TokenSpec(kind="continuous", shape=(64,), size=4))
    with pytest.raises(ValueError, match=r"unknown token kind 'discreet'\. Did you mean 'discrete'\?"):
        TokenSpec(kind="discreet", shape=(8,), size=2)


def test_schedules() -> None:
    step = lambda left: Step(index=0, of=1, positions=torch.empty(1, 0), drawn=0, left=left, total=16)  # noqa: E731
    assert LinearInTokens(3.0)(step(1)) == 1 + 2 * 15 / 16
    assert not needs_null_branch(None, [step(1)]) and not needs_null_branch(Constant(1), [step(1)])
    assert needs_null_branch(LinearInTokens(2.0), [step(16), step(1)])
    with pytest.raises(ValueError, match="below 1 or not finite"):
        needs_null_branch(Constant(float("nan")), [step(1)])


def test_inverse_cdf_never_picks_what_is_impossible() -> None:
    probabilities = torch.tensor([[0.0, 0.5, 0.5, 0.0]]).expand(3, -1)
    assert inverse_cdf(probabilities, torch.tensor([0.0, 0.5, 1.0])).tolist() == [1, 2, 2]


def test_filters_apply_in_the_order_given() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().reshape(1, 1, 4)
    prediction = Categorical(logits=logits, positions=torch.zeros(1, 1, dtype=torch.long))
    kept = lambda filters: prediction.filtered(top_k=2, top_p=0.5, filters=filters).isfinite().sum()  # noqa: E731
    assert kept(("top_k", "top_p")) == 1 and kept(("top_p", "top_k")) == 2  # 0.4 / 0.7 > 0.5, but 0.4 < 0.5
    with pytest.raises(ValueError, match="unknown filter 'topk'"):
        kept(("topk",))


def test_key_map_is_bijective_and_strict() -> None:
    key_map = KeyMap([
        Rename("a.{i}.w", "blocks.{i}.weight", lambda tensor: tensor.squeeze(-1), lambda tensor: tensor.unsqueeze(-1)),
        Split("qkv.{i}", ["q.{i}", "k.{i}", "v.{i}"]),
        Concat(["w1.{i}", "w3.{i}"], "gate_up.{i}"),
        Alias("again.{i}", of="head.{i}"),
        Rename("head.{rest*}", "out.{rest*}"),
        Ignore("table", lambda: torch.ones(2)),
    ])
    official = {"a.0.w": torch.randn(2, 3, 1), "qkv.1": torch.randn(6, 2), "w1.0": torch.randn(2, 2),
                "w3.0": torch.randn(2, 2), "head.7": torch.randn(2), "table": torch.ones(2)}
    official["again.7"] = official["head.7"].clone()
    ours = key_map.to_ours({f"module.{name}": tensor for name, tensor in official.items()})
    assert set(ours) == {"blocks.0.weight", "q.1", "k.1", "v.1", "gate_up.0", "out.7"}
    back = key_map.to_official(ours)
    assert back.keys() == official.keys() and all(torch.equal(back[name], official[name]) for name in official)
    with pytest.raises(ValueError, match=r"keys this model does not know: stranger\.weight"):
        key_map.to_ours(official | {"stranger.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"again\.7 should equal head\.7"):
        key_map.to_ours(official | {"again.7": torch.zeros(2)})


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path("pwned").write_text, ("boom",))


def test_files_that_are_not_checkpoints_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*absent\.pt.*never replaced by random weights"):
        read_weights(tmp_path / "absent.pt")
    save_weights(tmp_path / "a.safetensors", {"w": torch.randn(100)}, {"name": "tiny"})
    assert read_config(tmp_path / "a.safetensors") == {"name": "tiny"}
    torch.save({"model": {"w": torch.randn(100)}, "args": 3}, tmp_path / "a.pt")
    assert read_weights(tmp_path / "a.pt")["w"].shape == (100,)
    for name in ("a.safetensors", "a.pt"):
        path = tmp_path / f"cut_{name}"
        path.write_bytes((tmp_path / name).read_bytes()[:-150])
        with pytest.raises(ValueError, match=rf"cut_{name} is truncated"):
            read_weights(path)
    torch.save({"model": {"w": torch.zeros(1)}, "extra": _Bomb()}, tmp_path / "bomb.pt")
    (tmp_path / "raw.pkl").write_bytes(pickle.dumps(_Bomb()))
    for name in ("bomb.pt", "raw.pkl"):
        with pytest.raises(ValueError, match="refused: unpickling it would run code"):
            read_weights(tmp_path / name)
    assert not (tmp_path / "pwned").exists()


def test_weights_of_another_architecture_are_refused() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"1 missing \(bias\); 1 unexpected \(gain\); 1 of another shape "
                                         r"\(weight \(2, 4\), expected \(2, 3\)\)"):
        load_strictly(model, {"weight": torch.zeros(2, 4), "gain": torch.zeros(1)}, "file")


def test_saving_is_atomic(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, {"w": torch.zeros(3)}, {})
    with pytest.raises(TypeError):
        save_weights(path, {"w": torch.ones(3)}, {"bad": object()})
    assert read_weights(path)["w"].sum() == 0 and [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


def test_uint8_rules() -> None:
    images = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    assert to_uint8(images, "round").tolist() == [0, 0, 128, 255, 255]
    assert to_uint8(images, "truncate").tolist() == [0, 0, 127, 255, 255]
    with pytest.raises(ValueError, match="unknown uint8 rule 'floor'"):
        to_uint8(images, "floor")
