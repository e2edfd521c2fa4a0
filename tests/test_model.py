"""The model against transformers' GPT-2, its cache against no cache, and its shapes against the published ones."""

import math

import pytest
import torch
import transformers
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
import model as gpt
from kernels.embedding import embedding
from training.weights import transpose_conv1d

SMALL = gpt.GPTConfig(n_layer=2, n_head=4, n_embd=32, block_size=24, vocab_size=150)  # 106 columns of padding


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = gpt.GPT(SMALL).eval()
    with torch.no_grad():  # weights large enough to make the distributions sharp
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        model.transformer.wte.weight[SMALL.vocab_size :] = 5.0  # nothing may look at the padding
    return model


def random_tokens(*shape):
    return torch.randint(0, SMALL.vocab_size, shape)


def test_logits_loss_and_every_gradient_are_those_of_transformers(model):
    def theirs(name, tensor):
        return transpose_conv1d(name, tensor)[: 150 if "wte" in name else None]

    config = dict(vocab_size=150, n_positions=24, n_embd=32, n_layer=2, n_head=4)
    judge = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
    weights = {name: theirs(name, tensor) for name, tensor in model.state_dict().items()}
    judge.load_state_dict(weights | {"lm_head.weight": weights["transformer.wte.weight"]})
    tokens, targets = random_tokens(3, 20), random_tokens(3, 20)

    their_logits = judge(tokens).logits
    their_loss = F.cross_entropy(their_logits.flatten(0, 1), targets.flatten())
    their_loss.backward()
    loss = model(tokens, targets)
    loss.backward()

    torch.testing.assert_close(model(tokens), their_logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=1e-5)
    gradients = {name: theirs(name, parameter.grad) for name, parameter in model.named_parameters()}
    torch.testing.assert_close(gradients, {name: p.grad for name, p in judge.named_parameters()}, rtol=1e-5, atol=1e-5)


def test_without_kernels_the_model_has_second_derivatives_and_those_in_forward_mode(model, monkeypatch):
    monkeypatch.setenv("PYTORCH_JIT", "0")  # or forward mode compiles decompositions first, for seconds
    model.double()
    weights = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    direction = {name: torch.randn_like(p) for name, p in weights.items()}
    tokens = random_tokens(2, 9)

    def loss(weights):
        with sdpa_kernel(SDPBackend.MATH):  # PyTorch's flash attention has neither
            logits = torch.func.functional_call(model, weights, tokens)  # whose loss would be in float32
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    def gradients(step):
        moved = {name: p + step * direction[name] for name, p in weights.items()}
        return torch.autograd.grad(loss(moved), weights.values(), create_graph=True)

    slope = sum((each * direction[name]).sum() for name, each in zip(weights, gradients(0), strict=True))
    torch.testing.assert_close(torch.func.jvp(loss, (weights,), (direction,))[1], slope)
    expected = tuple((after - before) / 2e-6 for before, after in zip(gradients(-1e-6), gradients(1e-6), strict=True))
    torch.testing.assert_close(torch.autograd.grad(slope, weights.values()), expected, rtol=1e-5, atol=1e-6)


def test_a_tangent_that_only_gradients_bring_to_the_embedding_is_not_lost():
    weight, factor, direction = torch.randn(7, 3, requires_grad=True), torch.randn(3), torch.randn(3)
    tokens = torch.tensor([[1, 2, 2], [0, 6, 1]])

    def slope(factor, **options):
        loss = (embedding(weight, tokens) @ factor).square().sum()
        return torch.autograd.grad(loss, weight, **options)[0]

    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(slope(forward_ad.make_dual(factor, direction))).tangent
    factor.requires_grad_()
    expected = torch.autograd.functional.jvp(lambda f: slope(f, create_graph=True), factor, direction)[1]
    torch.testing.assert_close(found, expected)


def test_initialization_is_gpt2s():
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(n_layer=8, n_head=4, n_embd=128, block_size=64, vocab_size=1000))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            expected = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            rows = parameter[:1000] if "wte" in name else parameter
            assert rows.std().item() == pytest.approx(expected, rel=0.05), name
        else:
            assert (parameter == (1.0 if name.endswith("weight") else 0.0)).all(), name
    tokens = torch.randint(0, 1000, (4, 64))
    assert model(tokens, tokens.roll(1)).item() == pytest.approx(math.log(1000), abs=0.1)


def test_parameters_and_flops_are_counted_without_memory_as_published():
    with torch.device("meta"):
        model = gpt.GPT(gpt.GPTConfig(n_layer=48, n_head=25, n_embd=1600))
    assert model.parameter_count() == 1_557_611_200
    assert model.flops_per_token() == 6 * (1_557_611_200 - 1024 * 1600) + 12 * 48 * 1600 * 1024


def test_padding_of_the_vocabulary_is_out_of_loss_gradient_and_samples(model):
    tokens, targets = random_tokens(2, 10), random_tokens(2, 10)
    assert model.transformer.wte.weight.shape == (256, 32)
    assert model(tokens).shape == (2, 10, 150)
    loss = model(tokens, targets)
    loss.backward()
    torch.testing.assert_close(loss, F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()))
    assert (model.transformer.wte.weight.grad[150:] == 0).all()
    assert model.generate(tokens, 14, temperature=5.0).max() < 150


def test_loss_and_logits_can_come_together(model):
    tokens, targets = random_tokens(2, 7), random_tokens(2, 7)
    loss, logits = model(tokens, targets, return_logits=True)
    torch.testing.assert_close(loss, model(tokens, targets))
    torch.testing.assert_close(logits, model(tokens))


def test_targets_of_minus_100_are_left_out(model):
    tokens, targets = random_tokens(1, 8), random_tokens(1, 8)
    targets[0, 5:] = -100
    expected = F.cross_entropy(model(tokens)[0, :5], targets[0, :5])
    torch.testing.assert_close(model(tokens, targets), expected)


@pytest.mark.parametrize("prompt", [1, 5, 23, 24, 25, 40])
def test_greedy_text_is_the_same_with_and_without_the_cache_also_past_the_block_size(model, prompt):
    tokens = random_tokens(3, prompt)
    cached = model.generate(tokens, 30, temperature=0)
    assert torch.equal(cached, model.generate(tokens, 30, temperature=0, use_cache=False))
    for position in range(prompt, prompt + 30):  # and both are the argmax of a plain forward pass
        logits = model(cached[:, max(0, position - 24) : position])[:, -1]
        assert torch.equal(cached[:, position], logits.argmax(-1))
    assert len(set(cached[0, prompt:].tolist())) > 3  # the model is sharp enough to say different things


def test_a_stop_token_ends_its_sequence_alone_and_log_probabilities_are_those_of_a_forward_pass(model):
    prompt = random_tokens(5, 3)

    def draw(n, temperature, stop_token):
        generator = torch.Generator().manual_seed(0)
        steps = model.generate_stream(prompt, n, temperature, top_k=9, generator=generator, stop_token=stop_token)
        return [torch.stack(part, dim=1) for part in zip(*steps, strict=True)]

    free, log_probabilities = draw(21, 3.0, None)
    expected = model(torch.cat([prompt, free], dim=1)[:, :-1])[:, 2:].log_softmax(-1)
    torch.testing.assert_close(log_probabilities, expected.gather(2, free[..., None])[..., 0])

    stop = free[0, 3].item()
    for row, stopped in zip(free.tolist(), draw(21, 3.0, stop)[0].tolist(), strict=True):
        kept = row.index(stop) + 1 if stop in row else 21
        assert stopped == row[:kept] + [stop] * (21 - kept)
    prompt = prompt[:1].expand(3, 3)
    assert draw(21, 0.0, draw(1, 0.0, None)[0][0, 0].item())[0].shape == (3, 1)  # all have ended: so does the stream


def test_cache_takes_several_tokens_at_once(model):
    tokens = random_tokens(2, 12)
    caches = [gpt.KVCache(24) for _ in range(2)]
    parts = [model.hidden(part, caches) for part in tokens.split([5, 4, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model.hidden(tokens))


def test_sampling_follows_temperature_top_k_top_p_and_seed():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(20_000, 4)

    def frequencies(temperature=1.0, top_k=None, top_p=None, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return gpt.sample(logits, temperature, top_k, top_p, generator).bincount(minlength=4) / 20_000

    def near(a, b):
        torch.testing.assert_close(a, torch.tensor(b), atol=0.02, rtol=0)

    near(frequencies(), [0.5, 0.3, 0.15, 0.05])
    near(frequencies(top_k=2), [0.625, 0.375, 0.0, 0.0])
    near(frequencies(top_k=100), [0.5, 0.3, 0.15, 0.05])
    near(frequencies(top_p=0.79), [0.625, 0.375, 0.0, 0.0])  # 0.5 + 0.3 reaches 0.79
    near(frequencies(top_p=0.81), [0.526, 0.316, 0.158, 0.0])
    near(frequencies(top_p=0.0001), [1.0, 0.0, 0.0, 0.0])
    near(frequencies(temperature=0.5), [0.685, 0.247, 0.062, 0.007])
    near(frequencies(temperature=0), [1.0, 0.0, 0.0, 0.0])
    assert torch.equal(frequencies(seed=1), frequencies(seed=1))
    assert not torch.equal(frequencies(seed=1), frequencies(seed=2))


def test_a_model_without_blocks_is_a_bigram():
    model = gpt.GPT(gpt.GPTConfig(n_layer=0, n_head=1, n_embd=16, block_size=8, vocab_size=30)).eval()
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
    tokens = torch.tensor([[1, 2, 3, 2]])
    torch.testing.assert_close(model(tokens)[0, 1], model(tokens)[0, 3])
    assert model.generate(tokens, 12).shape == (1, 16)


def test_bfloat16_autocast_stays_near_float32(model):
    tokens, targets = random_tokens(2, 24), random_tokens(2, 24)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model(tokens, targets), rtol=0.02, atol=0.02)


def test_dropout_acts_in_training_only():
    model = gpt.GPT(gpt.GPTConfig(2, 4, 32, 24, 150, dropout=0.5))
    tokens = random_tokens(2, 24)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_written_out_has_the_dropout_and_mask_of_the_fused_call(dtype):
    qkv = torch.randn(2, 9, 96, dtype=dtype)
    y = kernels.select("none").causal_attention(qkv, 4, 0.0)
    q, k, v = (part.view(2, 9, 4, 8).transpose(1, 2).float() for part in qkv.split(32, dim=-1))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 9, 32)
    torch.testing.assert_close(y.float(), expected, rtol=0.03, atol=0.03)
    torch.manual_seed(0)
    dropped = kernels.select("none").causal_attention(torch.ones(64, 50, 96, dtype=dtype), 4, 0.25)
    assert dropped.float().mean().item() == pytest.approx(1.0, abs=0.03)  # what is kept is scaled by 1 / 0.75
    assert dropped.float().std().item() > 0.05


def test_it_compiles_into_one_graph(model):
    tokens, targets = random_tokens(2, 24), random_tokens(2, 24)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, targets), model(tokens, targets))


@pytest.mark.parametrize(
    "shape, names",
    [
        (dict(n_embd=100, n_head=3), ["--n-embd 100", "--n-head 3"]),
        (dict(n_head=0), ["--n-head is 0"]),
        (dict(n_layer=-1), ["--n-layer is -1"]),
        (dict(dropout=1.0), ["--dropout is 1.0"]),
        (dict(block_size=0), ["--block-size is 0"]),
    ],
)
def test_impossible_shapes_are_named(shape, names):
    with pytest.raises(ValueError) as error:
        gpt.GPTConfig(**shape)
    assert all(name in str(error.value) for name in names)


def test_too_long_a_sequence_is_named(model):
    with pytest.raises(ValueError, match="25 tokens do not fit a block size of 24"):
        model(random_tokens(1, 25))
