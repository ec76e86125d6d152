from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.adapters.rqvae import codebook_state, tokenizer_of, transformer_of
from tests.golden_case import load_case
from varzoo.core.draws import Draws
from varzoo.core.keymap import Concat, KeyMap
from varzoo.core.losses import Losses
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import Constant
from varzoo.generators.base import Batch, Condition
from varzoo.generators.conditioners import CaptionPrefix, ClassPrefix
from varzoo.generators.rq import RQTransformer
from varzoo.loading import Model, build, compose_config, fit_together
from varzoo.nn.residual_quantizer import ResidualQuantizer
from varzoo.samplers import Autoregressive
from varzoo.tokenizers.rq import RQTokenizer, fold_latents, unfold_latents
from varzoo.training.callbacks import read_metrics
from varzoo.training.run import train

GOLDENS = Path(__file__).parent / "goldens" / "rqvae"
HEIGHT, WIDTH, DEPTH, CODES = 2, 3, 3, 12  # not a square
SPEC = TokenSpec(kind="discrete", shape=(HEIGHT, WIDTH), size=CODES, depth=DEPTH)


def small_tokenizer(**options) -> RQTokenizer:
    config = {"image_size": [4, 6], "width": 32, "multipliers": [1, 1], "blocks_per_level": 1, "attention_levels": [1],
              "z_channels": 32, "latent_channels": 8, "fold": [1, 1], "codebook_size": CODES, "depth": DEPTH,
              "shared": True, "decay": 0.9, "restart": True, "commitment": 0.25, "temperature": 0.5,
              "uint8_rule": "round"}
    tokenizer = RQTokenizer(**(config | options))
    for book in tokenizer.quantizer.codebooks:
        book.vectors.normal_(generator=torch.Generator().manual_seed(2))
    return tokenizer


def small_generator(text: bool = False, **options) -> RQTransformer:
    torch.manual_seed(1)
    conditioner = (CaptionPrefix(length=4, vocabulary=9, width=32) if text
                   else ClassPrefix(num_classes=7, width=32, drop=0.0))
    config = {"spec": SPEC, "conditioner": conditioner, "width": 32, "body_depth": 2, "body_heads": 4, "head_depth": 2,
              "head_heads": 2, "code_channels": 8, "shared_table": True, "cumulative": True, "shared_classifier": True,
              "dropout": 0.1}
    model = RQTransformer(**(config | options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if model.embeds_codebook:
        model.use_codebook(small_tokenizer().codebook())
    return model.eval()


KINDS = {"class": {}, "text": {"text": True},
         "text_tables": {"text": True, "code_channels": None, "shared_table": False, "shared_classifier": False,
                         "cumulative": False}}


def condition_of(model: RQTransformer, size: int) -> Condition:
    if model.num_classes is not None:
        return Condition.classes(torch.arange(size) % 7)
    return Condition.captions(torch.randint(9, (size, 4), generator=torch.Generator().manual_seed(4)))


def draw(model: RQTransformer, condition: Condition, samples: tuple[int, ...], **settings: object) -> Tensor:
    return Autoregressive(draw=settings).sample(model, condition, Draws(5, samples)).tokens


# The quantiser


@pytest.mark.parametrize("shared", [True, False])
def test_each_level_takes_the_nearest_code_of_what_is_left(shared: bool) -> None:
    tokenizer = small_tokenizer(shared=shared).eval()
    x = torch.randn(2, 5, 8)
    quantised, vectors = tokenizer.quantizer(x), tokenizer.codebook()
    for level in range(DEPTH):
        table = vectors if shared else vectors[level]
        left = x - (quantised.partial_sums[level - 1] if level else 0)
        assert torch.equal(quantised.ids[..., level], torch.cdist(left, table).argmin(-1))
    torch.testing.assert_close(tokenizer.quantizer.embed(quantised.ids).cumsum(-2).permute(2, 0, 1, 3),
                               quantised.partial_sums)


def test_a_deeper_code_is_no_worse_once_the_codebook_fits() -> None:
    quantizer, x = ResidualQuantizer(size=16, channels=4, depth=4, shared=False, decay=0.5, restart=True), torch.randn(
        8, 32, 4)
    for step in range(30):
        quantizer(x, Draws(0, range(8)).keyed(iteration=step))
    errors = (quantizer(x).partial_sums - x).square().mean((1, 2, 3))
    assert (errors.diff() < 0).all() and errors[0] < 0.5


def test_a_collapsed_codebook_is_restarted() -> None:
    x = torch.randn(8, 32, 4)

    def usage(restart: bool) -> int:
        quantizer = ResidualQuantizer(size=16, channels=4, depth=1, shared=True, decay=0.9, restart=restart)
        book = quantizer.codebooks[0]
        book.vectors.fill_(50.0)  # all far away, so that one code takes every vector
        book.vectors[3] = 0.0
        book.counts.fill_(3.0)
        book.sums.copy_(3 * book.vectors)
        for step in range(20):
            quantizer(x, Draws(0, range(8)).keyed(iteration=step))
        return len(quantizer(x).ids.unique())

    assert usage(restart=False) == 1
    assert usage(restart=True) == 16


def test_restarts_are_draws_and_eval_does_not_learn() -> None:
    x = torch.randn(2, 4, 8)

    def state(seed: int) -> Tensor:
        quantizer = small_tokenizer().quantizer
        quantizer(x, Draws(seed, (3, 4)))
        return quantizer.codebooks[0].vectors

    assert torch.equal(state(0), state(0)) and not torch.equal(state(0), state(1))
    tokenizer, images = small_tokenizer().eval(), torch.rand(2, 3, 4, 6)
    before = tokenizer.codebook().clone()
    tokenizer.reconstruction_losses(images, Draws(0, (0, 1)))
    assert torch.equal(tokenizer.codebook(), before)
    tokenizer.train().reconstruction_losses(images, Draws(0, (0, 1)))
    assert not torch.equal(tokenizer.codebook(), before)


def test_a_shared_codebook_moves_between_levels() -> None:
    """As officially: the second level searches what the first has moved, so learning and merely looking differ."""
    x = torch.randn(4, 16, 8)
    moved = small_tokenizer(decay=0.0, restart=False).quantizer
    looked = moved(x).ids
    learned = moved(x, Draws(0, range(4))).ids
    assert torch.equal(looked[..., 0], learned[..., 0]) and not torch.equal(looked[..., 1], learned[..., 1])
    separate = small_tokenizer(decay=0.0, restart=False, shared=False).quantizer
    assert torch.equal(separate(x).ids, separate(x, Draws(0, range(4))).ids)


PROCESSES = """
import sys, torch
from torch import distributed
from varzoo.core.draws import Draws
from varzoo.nn.residual_quantizer import ResidualQuantizer
rank, world, port = map(int, sys.argv[1:4])
if world > 1:
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
torch.manual_seed(0)
quantizer = ResidualQuantizer(size=24, channels=4, depth=3, shared=True, decay=0.9, restart=True)
x = torch.randn(5, 8, 6, 4)
share = 8 // world
rows = range(rank * share, (rank + 1) * share)
for step in range(5):
    quantizer(x[step, rows.start:rows.stop], Draws(7, rows).keyed(iteration=step))
torch.save(quantizer.state_dict(), sys.argv[4])
if world > 1:
    distributed.barrier()  # none leaves while another still needs it
    distributed.destroy_process_group()
"""


def test_two_processes_learn_the_same_codebook_as_one(tmp_path: Path) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    jobs = [(0, 1, tmp_path / "one"), (0, 2, tmp_path / "first"), (1, 2, tmp_path / "second")]
    running = [subprocess.Popen([sys.executable, "-c", PROCESSES, str(rank), str(world), str(port), str(path)])
               for rank, world, path in jobs]
    assert [process.wait(timeout=100) for process in running] == [0, 0, 0]
    one, first, second = (torch.load(path, weights_only=True) for _, _, path in jobs)
    for name, tensor in one.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor, atol=1e-5, rtol=1e-5)


def test_folding_is_inverted() -> None:
    latents = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    vectors = fold_latents(latents, (2, 3))
    assert vectors.shape == (2, 4, 18)
    assert torch.equal(vectors[0, 1, :3], latents[0, :, 0, 3])  # channels vary fastest
    assert torch.equal(unfold_latents(vectors, (2, 3), (2, 2)), latents)
    tokenizer = small_tokenizer(image_size=[8, 12], fold=[2, 2])
    assert tokenizer.spec == SPEC and tokenizer.encode(torch.rand(1, 3, 8, 12)).shape == (1, 6, 3)


def test_soft_codes_follow_distances_and_draws_follow_soft_codes() -> None:
    tokenizer, count = small_tokenizer().eval(), 3000
    latents = torch.randn(1, 6, 8).expand(count, -1, -1)
    ids = tokenizer.tokens(latents[:1])
    soft = tokenizer.extras(latents[:1], ids)["soft_targets"]
    assert torch.equal(soft.argmax(-1), ids) and torch.allclose(soft.sum(-1), torch.ones(()))
    drawn = tokenizer.tokens(latents, Draws(0, range(count)))
    shares = torch.nn.functional.one_hot(drawn[:, :, 0], CODES).float().mean(0)
    torch.testing.assert_close(shares, soft[0, :, 0], atol=0.04, rtol=0)
    first = tokenizer.extras(latents, drawn)["soft_targets"]  # of the second level, along the path that was drawn
    left = latents[0, 0] - tokenizer.codebook()[drawn[7, 0, 0]]
    expected = (-(left - tokenizer.codebook()).square().sum(-1) / 0.5).softmax(-1)
    torch.testing.assert_close(first[7, 0, 1], expected, atol=1e-4, rtol=1e-3)


def test_statistics_of_every_level() -> None:
    tokenizer, images = small_tokenizer(), torch.rand(3, 3, 4, 6)
    parts = tokenizer.eval().reconstruction_losses(images, Draws(0, range(3)))[1].parts
    ids = tokenizer.encode(images)
    for level in range(DEPTH):
        used = len(ids[..., level].unique())
        assert parts[f"usage_{level + 1}"] == pytest.approx(used / CODES)
        assert 1 <= parts[f"perplexity_{level + 1}"] <= used + 1e-4


def test_a_run_logs_usage_and_perplexity_of_every_level(tmp_path: Path) -> None:
    folder = train(compose_config("train", ["experiment=smoke_rqvae", f"run_dir={tmp_path / 'run'}", "log_every=1",
                                            "samples_every=0"]))
    metrics = read_metrics(folder / "logs")
    for level in range(1, 5):
        usage, perplexities = ([value for _, value in metrics[f"train/{name}_{level}"]]
                               for name in ("usage", "perplexity"))
        assert len(usage) == len(perplexities) == 6
        assert all(1 <= even <= 128 * used + 1e-3 for even, used in zip(perplexities, usage))


def test_the_objective_of_the_official_training() -> None:
    settings = ["objective=rqvae", "objective.perceptual=null", "objective.perceptual_weight=0"]  # needs no weights
    objective = build(compose_config("train", ["experiment=digits_rqvae", *settings]).objective)
    images, decoded = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64, requires_grad=True)
    bottleneck = Losses(torch.tensor(0.3), {})
    last = torch.ones((), requires_grad=True)
    losses = objective.generator_losses(images, decoded * last, bottleneck, 0, last)
    pixels, fooled = torch.nn.functional.mse_loss(decoded, images), -objective.discriminator(decoded).mean()
    balance = (torch.autograd.grad(torch.nn.functional.mse_loss(decoded * last, images), last)[0].norm()
               / (torch.autograd.grad(-objective.discriminator(decoded * last).mean(), last)[0].norm() + 1e-4))
    expected = pixels + 0.3 + 0.75 * balance.clamp(max=1e4) * fooled
    torch.testing.assert_close(losses.total, expected, atol=1e-4, rtol=1e-3)
    fake, real = objective.discriminator(decoded), objective.discriminator(images)
    hinge = 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())
    torch.testing.assert_close(objective.discriminator_losses(images, decoded, 0).total, 0.75 * hinge, atol=1e-4,
                               rtol=1e-3)


def test_previews_refine_and_bad_input_is_refused() -> None:
    tokenizer = small_tokenizer().eval()
    tokens = tokenizer.encode(torch.rand(2, 3, 4, 6))
    torch.testing.assert_close(tokenizer.preview(tokens, DEPTH), tokenizer.decode(tokens))
    torch.testing.assert_close(tokenizer.preview(tokens, 1, "select"), tokenizer.preview(tokens, 1))
    assert not torch.allclose(tokenizer.preview(tokens, 2, "select"), tokenizer.preview(tokens, 2))
    with pytest.raises(ValueError, match=r"level must lie in 1 to 3, the depth of the code; got 4\."):
        tokenizer.preview(tokens, 4)
    with pytest.raises(ValueError, match="unknown preview 'sum'"):
        tokenizer.preview(tokens, 1, "sum")
    with pytest.raises(ValueError, match=r"expected ids \[B, 6, 3\] for .*, got \[2, 6, 2\]"):
        tokenizer.decode(tokens[..., :2])
    with pytest.raises(ValueError, match="ids must lie in 0 to 11, the codebook; got 12 to 12"):
        tokenizer.decode(torch.full_like(tokens, 12))
    with pytest.raises(ValueError, match=r"fold must be \(height, width\) that divide the latent grid \(2, 3\)"):
        small_tokenizer(fold=[2, 2])
    with pytest.raises(ValueError, match="need temperature > 0"):
        small_tokenizer(temperature=0.0)


def test_a_code_of_depth_one_is_a_plain_code() -> None:
    tokenizer = small_tokenizer(depth=1).eval()
    tokens = tokenizer.encode(torch.rand(2, 3, 4, 6))
    assert tokens.shape == (2, 6) and tokenizer.decode(tokens).shape == (2, 3, 4, 6)
    assert tokenizer.extras(torch.randn(2, 6, 8), tokens)["soft_targets"].shape == (2, 6, CODES)


# The generator


@pytest.mark.parametrize("kind", KINDS)
def test_cached_equals_uncached_on_both_axes(kind: str) -> None:
    model = small_generator(**KINDS[kind])
    condition, draws = condition_of(model, 3), Draws(0, range(3))
    decoding = model.begin(condition, draws=draws)
    for step in decoding.steps:
        prediction = decoding.predict(step)
        place, cache = step.index, model.new_level_cache(3)
        drawn = prediction.draw(draws).tokens
        logits = [prediction.network.next_logits(prediction.context, drawn[..., :level], cache)
                  for level in range(DEPTH)]
        tokens = decoding.tokens.clone()  # what is not drawn yet is zero, and unseen
        tokens[:, place] = drawn[:, 0]
        torch.testing.assert_close(torch.cat(logits, 1), model.logits(tokens, condition)[:, place], atol=2e-5,
                                   rtol=1e-4)
        assert torch.equal(decoding.predict(step).context, prediction.context)  # predicting changes nothing
        assert torch.equal(prediction.draw(draws).tokens, drawn)
        decoding.commit(step, drawn)
    assert decoding._done == HEIGHT * WIDTH and decoding.tokens.shape == (3, 6, DEPTH)


def test_a_code_depends_on_positions_and_levels_before_it_only() -> None:
    model, condition = small_generator(), Condition.classes(torch.tensor([3]))
    tokens = torch.randint(CODES, (1, 6, DEPTH))
    logits = model.logits(tokens, condition)
    for place in range(6):
        for level in range(DEPTH):
            other = tokens.clone()
            other[0, place, level] = (other[0, place, level] + 1) % CODES
            changed = (model.logits(other, condition) != logits).any(-1)[0].flatten()
            # The same position's later levels, and every level of later positions.
            expected = torch.arange(6 * DEPTH) > place * DEPTH + level
            assert torch.equal(changed, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_does_not_depend_on_its_batch(kind: str) -> None:
    model = small_generator(**KINDS[kind])
    condition = condition_of(model, 6)
    together = draw(model, condition, tuple(range(6)))
    order = torch.tensor([5, 0, 3])
    some = Condition(size=3, **{name: value[order] for name, value in vars(condition).items()
                                if isinstance(value, Tensor)})
    assert torch.equal(draw(model, some, tuple(order.tolist())), together[order])
    one = Condition(size=1, **{name: value[4:5] for name, value in vars(condition).items()
                               if isinstance(value, Tensor)})
    assert torch.equal(draw(model, one, (4,)), together[4:5])
    assert len({tuple(row.flatten().tolist()) for row in together}) == 6


def test_two_decodings_at_once() -> None:
    model, draws = small_generator(), Draws(5, (0, 1))
    conditions = [Condition.classes(torch.tensor(labels)) for labels in ([1, 2], [3, 4])]
    decodings = [model.begin(condition, draws=draws) for condition in conditions]
    for steps in zip(*(decoding.steps for decoding in decodings)):
        predictions = [decoding.predict(step) for decoding, step in zip(decodings, steps)]
        for decoding, step, prediction in zip(decodings, steps, predictions):
            decoding.commit(step, prediction.draw(draws).tokens)
    for decoding, condition in zip(decodings, conditions):
        assert torch.equal(decoding.tokens, draw(model, condition, (0, 1)))


def test_limits_per_level() -> None:
    model, condition = small_generator(), Condition.classes(torch.arange(6) % 7)
    greedy = draw(model, condition, tuple(range(6)), temperature=0.0)
    assert torch.equal(draw(model, condition, tuple(range(6)), top_k=1), greedy)
    mixed = draw(model, condition, tuple(range(6)), top_k=[1, 0, 0])
    assert torch.equal(mixed[:, 0, 0], greedy[:, 0, 0]) and not torch.equal(mixed[:, 0], greedy[:, 0])
    with pytest.raises(ValueError, match=r"top_k must be one value, or one for each of the 3 levels; got \[1, 2\]"):
        draw(model, condition, tuple(range(6)), top_k=[1, 2])
    with pytest.raises(ValueError, match="draw option 'steps' does not fit"):
        draw(model, condition, tuple(range(6)), steps=3)


def test_drawn_codes_follow_the_model() -> None:
    model, count = small_generator(), 4000
    condition = Condition.classes(torch.zeros(count, dtype=torch.long))
    decoding = model.begin(condition, draws=Draws(0, range(count)))
    step = next(decoding.steps)
    drawn = decoding.predict(step).draw(Draws(5, range(count))).tokens[:, 0]
    logits = model.logits(torch.cat([drawn[:, None], torch.zeros(count, 5, DEPTH, dtype=torch.long)], 1), condition)
    expected = logits[:, 0, 0].softmax(-1)[0]
    torch.testing.assert_close(drawn[:, 0].bincount(minlength=CODES) / count, expected, atol=0.03, rtol=0)
    first = expected.argmax()
    given = drawn[:, 0] == first
    second = logits[given, 0, 1].softmax(-1)[0]
    torch.testing.assert_close(drawn[given, 1].bincount(minlength=CODES) / given.sum(), second, atol=0.06, rtol=0)


def test_soft_targets_are_learned_from() -> None:
    model, tokens = small_generator(), torch.randint(CODES, (2, 6, DEPTH))
    condition, draws = condition_of(model, 2), Draws(0, (0, 1))
    hard = model.loss(Batch(tokens=tokens, condition=condition), draws, 0.0).total
    soft = torch.nn.functional.one_hot(tokens, CODES).float()
    same = model.loss(Batch(tokens=tokens, condition=condition, extras={"soft_targets": soft}), draws, 0.0).total
    torch.testing.assert_close(hard, same)
    weights = torch.tensor([1.0, 0.0])
    first = model.loss(Batch(tokens=tokens, condition=condition, weights=weights), draws, 0.0).total
    alone = model.loss(Batch(tokens=tokens[:1], condition=condition_of(model, 1)), draws.rows([0]), 0.0).total
    torch.testing.assert_close(first, alone)
    text = small_generator(text=True)
    losses = text.loss(Batch(tokens=tokens, condition=condition_of(text, 2)), draws, 0.0)
    assert losses.parts.keys() == {"cross_entropy", "caption"}


# Composition


def test_the_codebook_comes_with_the_tokenizer() -> None:
    model = small_generator()
    model.codebook = None
    with pytest.raises(ValueError, match="has none yet: compose the two"):
        model.logits(torch.zeros(1, 6, DEPTH, dtype=torch.long), condition_of(model, 1))
    tokenizer = small_tokenizer().eval()
    images, _ = Model(tokenizer=tokenizer, generator=model, sampler=Autoregressive()).sample([1, 2])
    assert images.shape == (2, 3, 4, 6) and torch.equal(model.codebook[0], tokenizer.codebook())
    assert not any("codebook" in name for name in model.state_dict())
    separate = small_tokenizer(shared=False)
    separate.quantizer.codebooks[1].vectors.neg_()
    fit_together(separate, model)
    ids = torch.randint(CODES, (2, 6, DEPTH))
    torch.testing.assert_close(model.code_vectors(ids), separate.embed(ids))
    with pytest.raises(ValueError, match=r"embeds 12 codes of 8 channels.*the tokenizer has \[12, 4\]"):
        fit_together(small_tokenizer(latent_channels=4), model)
    with pytest.raises(ValueError, match="tokenizer and generator do not fit"):
        fit_together(small_tokenizer(depth=2), model)


def test_what_does_not_fit_is_refused() -> None:
    model, text = small_generator(), small_generator(text=True)
    with pytest.raises(ValueError, match="no null class"):
        model.begin(condition_of(model, 1), draws=Draws(0, (0,)), guidance=Constant(2.0))
    with pytest.raises(ValueError, match="no null caption"):
        text.begin(condition_of(text, 1), draws=Draws(0, (0,)), guidance=Constant(2.0))
    with pytest.raises(ValueError, match=r"expected ids \[B, 6, 3\]"):
        model.logits(torch.zeros(1, 6, dtype=torch.long), condition_of(model, 1))
    with pytest.raises(ValueError, match="depth above 1"):
        small_generator(spec=TokenSpec(kind="discrete", shape=(2, 3), size=CODES))
    with pytest.raises(ValueError, match="unknown class id 7"):
        model.begin(Condition.classes(torch.tensor([7])), draws=Draws(0, (0,)))
    with pytest.raises(ValueError, match=r"captions must be ids \[B, 4\] in 0 to 8"):
        text.begin(Condition.captions(torch.full((1, 4), 9)), draws=Draws(0, (0,)))
    with pytest.raises(ValueError, match=r"give Condition\.captions"):
        text.begin(Condition.nothing(1), draws=Draws(0, (0,)))


# Official layouts


@pytest.mark.parametrize("name", ["transformer_class", "transformer_text"])
def test_the_transformers_layout_is_bijective(name: str) -> None:
    case = load_case(GOLDENS / name)
    model = transformer_of(case.config, case.state_dict)
    official = {key: value for key, value in case.state_dict.items() if not key.startswith("quantizer.")}
    if name == "transformer_text":
        official["tok_emb.offsets"] = torch.arange(3) * 13
    back = model.key_maps()["rqvae"].to_official(model.state_dict())
    assert back.keys() == official.keys() and all(torch.equal(back[key], value) for key, value in official.items())


@pytest.mark.parametrize("shared", [True, False])
def test_the_tokenizers_layout_is_bijective(shared: bool) -> None:
    case = load_case(GOLDENS / "autoencoder")
    state = dict(case.state_dict)
    depth = case.config["code_shape"][2]
    for level in range(1 if shared else depth):
        state[f"quantizer.codebooks.{level}.weight"] = torch.randn(25, 16)
        state[f"quantizer.codebooks.{level}.weight"][-1] = 0  # the padding row
    tokenizer = tokenizer_of(case.config | {"shared_codebook": shared}, state)
    official = codebook_state(state, depth, shared, "quantizer.")
    back = tokenizer.key_maps()["rqvae"].to_official(tokenizer.state_dict())
    assert back.keys() == official.keys() and all(torch.equal(back[key], value) for key, value in official.items())
    if shared:
        official["quantizer.codebooks.2.weight"] = official["quantizer.codebooks.2.weight"] + 1
        with pytest.raises(ValueError, match=r"codebooks\.2\.weight should equal quantizer\.codebooks\.0\.weight"):
            tokenizer.key_maps()["rqvae"].to_ours(official)


def test_concatenation_finds_its_parts_in_any_order() -> None:
    key_map = KeyMap([Concat(["{i}.a", "{i}.b"], "{i}.ab")])
    parts = {"x.b": torch.ones(1), "x.a": torch.zeros(1)}
    assert key_map.to_ours(parts)["x.ab"].tolist() == [0, 1]
