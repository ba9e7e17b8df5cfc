"""The pure functions: schedule, objectives, noise, guidance, walk, learning rates."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from models.conditioning import Conditioning, image_time_ids, uncropped_time_ids
from models.denoise import generate, predict_guided
from models.diffusion import Schedule
from models.ema import Ema
from models.errors import ModelError
from models.noise import SampleNoise
from models.objectives import Scores, dmd, vsd
from trainer.config.schema import OptimizerSettings, WalkSettings
from trainer.engine.optimizer import learning_rate
from trainer.path.candidates import choose_nodes
from trainer.path.target import fixed_switches, moves_on, target_node

SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


SD3 = dict(FlowMatchEulerDiscreteScheduler(shift=3.0).config) | {"_class_name": "FlowMatchEulerDiscreteScheduler"}


def schedule(prediction="epsilon", shift=1.0) -> Schedule:
    config = SD3 if prediction == "flow" else SDXL | {"prediction_type": prediction}
    return Schedule.from_config(config, shift)


def test_schedule_is_sdxls():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = torch.cumprod(1 - betas, 0)
    assert torch.allclose(schedule().alphas.double() ** 2, expected, atol=1e-6)
    with pytest.raises(ModelError, match="flow"):
        schedule("flow_prediction")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow"])
def test_predictions_convert_to_x0(prediction):
    s, rng = schedule(prediction), torch.Generator().manual_seed(0)
    x0, eps = torch.randn(6, 4, 3, 3, generator=rng), torch.randn(6, 4, 3, 3, generator=rng)
    t = torch.tensor([0, 20, 399, 500, 800, 999]) + s.first  # 1000 of a flow is pure noise
    x_t = s.add_noise(x0, eps, t)
    truth = s.target(x0, eps, t)
    assert torch.allclose(s.to_x0(truth, x_t, t), x0, atol=2e-4)


def test_timesteps_cover_their_range():
    s = schedule()
    assert s.timesteps(torch.tensor([0.0, 0.5, 0.9999999])).tolist() == [0, 500, 999]
    assert s.timesteps(torch.tensor([0.0, 0.5, 0.9999999]), 0.02, 0.98).tolist() == [20, 500, 979]


def test_flow_schedule_is_diffusers():
    """Told 1000 sigma, x_t as diffusers makes it, whatever the scheduler's own shift."""
    theirs, ours = FlowMatchEulerDiscreteScheduler(shift=1.0), schedule("flow")
    rng = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(3, 4, 3, 3, generator=rng), torch.randn(3, 4, 3, 3, generator=rng)
    t = torch.tensor([1, 400, 1000])
    assert torch.allclose(ours.add_noise(x0, eps, t), theirs.scale_noise(x0, t, eps), atol=1e-6)
    assert torch.equal(ours.add_noise(x0, eps, torch.full((3,), ours.last)), eps)
    assert ours.timesteps(torch.tensor([0.0, 0.5, 0.9999999])).tolist() == [1, 501, 1000]
    with pytest.raises(ModelError, match="use_dynamic_shifting"):
        Schedule.from_config(SD3 | {"use_dynamic_shifting": True})


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_timestep_shift_moves_the_draws_and_nothing_else(prediction):
    plain, shifted = schedule(prediction), schedule(prediction, 3.0)
    u = torch.linspace(0, 0.9999, 1000)
    assert torch.equal(schedule(prediction, 1.0).timesteps(u), plain.timesteps(u))
    assert torch.equal(shifted.timesteps(u), plain.timesteps(3 * u / (1 + 2 * u)))
    assert shifted.timesteps(torch.tensor([0.5])).item() == 750 + plain.first
    low, high = shifted.timesteps(u, 0.02, 0.98).min(), shifted.timesteps(u, 0.02, 0.98).max()
    assert (low, high) == (20 + plain.first, 979 + plain.first)
    assert torch.equal(plain.alphas, shifted.alphas) and torch.equal(plain.sigmas, shifted.sigmas)


def test_schedulers_that_are_not_known():
    with pytest.raises(ModelError, match="has no betas"):
        Schedule.from_config({"_class_name": "EDMEulerScheduler", "sigma_min": 0.002})
    with pytest.raises(ModelError, match="rescale_betas_zero_snr"):
        Schedule.from_config(SDXL | {"rescale_betas_zero_snr": True})


def test_one_step_generator_is_the_papers_formula():
    s, rng = schedule(), torch.Generator().manual_seed(0)
    z, eps = torch.randn(2, 4, 3, 3, generator=rng), torch.randn(2, 4, 3, 3, generator=rng)

    class Net(torch.nn.Module):
        dtype = torch.float32

        def forward(self, x, t, **kwargs):
            assert t.tolist() == [399, 399]
            return (eps,)

    cond = Conditioning(torch.zeros(2, 3, 4), torch.zeros(2, 4), uncropped_time_ids(2, (8, 8), torch.device("cpu")))
    abar = s.alphas[399] ** 2
    expected = (z - (1 - abar).sqrt() * eps) / abar.sqrt()
    assert torch.allclose(generate(Net(), z, cond, s, 399), expected, atol=1e-6)


def test_guidance_mixes_conditional_and_empty():
    calls = []

    class Net(torch.nn.Module):
        dtype = torch.float32

        def forward(self, x, t, encoder_hidden_states, added_cond_kwargs, return_dict):
            calls.append(len(x))
            return (encoder_hidden_states.mean((1, 2))[:, None, None, None].expand_as(x),)

    cond = Conditioning(torch.ones(2, 3, 4), torch.ones(2, 4), torch.zeros(2, 6))
    x, t = torch.zeros(2, 4, 3, 3), torch.zeros(2, dtype=torch.long)
    guided, plain = predict_guided(Net(), x, t, cond, 8.0)
    assert calls == [4] and guided.unique().tolist() == [8.0] and plain.unique().tolist() == [1.0]
    guided, plain = predict_guided(Net(), x, t, cond, 1.0)
    assert calls == [4, 2] and guided is plain
    guided, plain = predict_guided(Net(), x, t, cond, 8.0, one_call=False)
    assert calls == [4, 2, 2, 2] and guided.unique().tolist() == [8.0] and plain.unique().tolist() == [1.0]


def test_empty_caption_that_is_not_zero():
    cond = Conditioning(torch.ones(2, 3, 4), empty_states=torch.full((2, 3, 4), 5.0), family="sd")
    assert cond.unconditional().states.unique().tolist() == [5.0] and cond.unconditional().pooled is None
    assert cond.doubled().states[:, 0, 0].tolist() == [5, 5, 1, 1]
    assert cond.dropped(torch.tensor([True, False])).states[:, 0, 0].tolist() == [5, 1]
    half = cond.map(lambda v: v[:1])
    assert len(half.states) == len(half.empty_states) == 1 and half.family == "sd"


def test_caption_dropout_and_time_ids():
    cond = Conditioning(torch.ones(2, 3, 4), torch.ones(2, 4), torch.ones(2, 6))
    dropped = cond.dropped(torch.tensor([True, False]))
    assert dropped.states.sum((1, 2)).tolist() == [0, 12] and dropped.pooled.sum(1).tolist() == [0, 4]
    assert dropped.time_ids.sum() == 12
    ids = image_time_ids(torch.tensor([[600, 800]]), torch.tensor([[0, 85]]), (512, 512))
    assert ids.tolist() == [[600, 800, 0, 85, 512, 512]]


def scores(shift: float) -> Scores:
    rng = torch.Generator().manual_seed(0)
    x0, target_x0 = torch.randn(3, 4, 5, 5, generator=rng), torch.randn(3, 4, 5, 5, generator=rng)
    alpha, sigma = schedule().alpha_sigma(torch.tensor([100, 400, 900]))
    return Scores(x0, target_x0, target_x0 + shift, alpha, sigma)


@pytest.mark.parametrize("objective", [vsd, dmd])
def test_objectives_push_from_the_fake_to_the_target(objective):
    assert objective(scores(0.0)).abs().max() == 0.0
    # The fake estimate lies above the target's: descending the gradient lowers x0.
    assert objective(scores(0.5)).min() > 0


def test_vsd_is_the_weighted_noise_difference():
    s, t = schedule(), torch.tensor([100, 400, 900])
    sc = scores(0.3)
    x_t = s.add_noise(sc.x0, torch.ones_like(sc.x0), t)
    eps_fake, eps_target = ((x_t - sc.alpha * x0) / sc.sigma for x0 in (sc.fake_x0, sc.target_x0))
    assert torch.allclose(vsd(sc), sc.sigma**2 * (eps_target - eps_fake), atol=1e-5)


def test_dmd_is_normalised_by_sample():
    sc = scores(0.3)
    norm = (sc.x0 - sc.target_x0).abs().mean((1, 2, 3))
    assert torch.allclose(dmd(sc)[:, 0, 0, 0] * norm, torch.full((3,), 0.3), atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_objectives_are_the_score_difference_of_gaussians(prediction):
    """Target N(1, 0.5^2), fake N(-1, 1.5^2): both gradients from the scores of x_t, which are known."""
    s, rng = schedule(prediction), torch.Generator().manual_seed(0)
    x0, t = torch.randn(6, 4, 3, 3, generator=rng), torch.tensor([20, 200, 400, 600, 800, 970])
    x_t, (alpha, sigma) = s.add_noise(x0, torch.randn(x0.shape, generator=rng), t), s.alpha_sigma(t)

    def score(mean, deviation):  # of N(alpha mean, alpha^2 deviation^2 + sigma^2)
        return -(x_t - alpha * mean) / (alpha**2 * deviation**2 + sigma**2)

    def estimate(found):  # Tweedie: E[x0 | x_t]
        return (x_t + sigma**2 * found) / alpha

    target, fake = score(1.0, 0.5), score(-1.0, 1.5)
    sc = Scores(x0, estimate(target), estimate(fake), alpha, sigma)
    assert torch.allclose(vsd(sc), sigma**3 * (fake - target), rtol=1e-3, atol=1e-5)
    scale = (x0 - estimate(target)).abs().mean((1, 2, 3), keepdim=True)
    assert torch.allclose(dmd(sc), sigma**2 / alpha * (fake - target) / scale, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_score_distillation_moves_a_gaussian_to_its_target(prediction):
    """One dimension, exact scores: the generator N(mu, 1) descends to the target N(2, 1)."""
    s, noise = schedule(prediction), SampleNoise(0)
    mu = torch.zeros(1, requires_grad=True)
    adam = torch.optim.Adam([mu], lr=0.05)
    index = list(range(64))
    for step in range(200):
        x0 = mu + noise.at(step, index).normal("z", (1, 1, 1))
        sample = x0.detach()
        t = s.timesteps(noise.at(step, index).uniform("t"), 0.02, 0.98)
        x_t = s.add_noise(sample, noise.at(step, index).normal("eps", (1, 1, 1)), t)
        alpha, sigma = s.alpha_sigma(t)

        def estimate(mean, x_t=x_t, alpha=alpha, sigma=sigma):  # E[x0 | x_t] for N(mean, 1)
            return mean + alpha * (x_t - alpha * mean) / (alpha**2 + sigma**2)

        gradient = vsd(Scores(sample, estimate(2.0), estimate(mu.detach()), alpha, sigma))
        (x0 * gradient).mean().backward()
        adam.step()
        adam.zero_grad()
    assert float(mu) == pytest.approx(2.0, abs=0.1)


def test_noise_belongs_to_the_sample():
    noise = SampleNoise(3)
    whole = noise.at(5, [0, 1, 2, 3]).normal("z", (2, 2))
    parts = torch.cat([noise.at(5, [0, 1]).normal("z", (2, 2)), noise.at(5, [2, 3]).normal("z", (2, 2))])
    assert torch.equal(whole, parts)
    for other in (SampleNoise(4).at(5, [0]).normal("z", (2, 2)), noise.at(5, [0]).normal("t", (2, 2))):
        assert not torch.equal(whole[:1], other)
    assert not torch.equal(whole[:1], noise.at(6, [0]).normal("z", (2, 2)))
    many = noise.at(0, list(range(4000))).normal("z", (4,))
    assert abs(float(many.mean())) < 0.03 and float(many.std()) == pytest.approx(1, abs=0.02)
    draws = noise.at(0, list(range(4000))).uniform("t")
    assert float(draws.min()) >= 0 and float(draws.max()) < 1 and float(draws.mean()) == pytest.approx(0.5, abs=0.02)


def test_ema():
    weights = [torch.zeros(3), torch.zeros(2)]
    ema = Ema(weights, 0.9)
    ema.update([torch.ones(3), torch.ones(2)])
    assert torch.allclose(ema.shadow[0], torch.full((3,), 0.1)) and not weights[0].any()
    warm = Ema(weights, 0.9, warmup=True)
    for earlier, share in ((0, 0.1), (8, 0.5), (80, 0.9), (1000, 0.9)):
        before = float(warm.shadow[0][0])
        warm.update([torch.ones(3), torch.ones(2)], earlier)
        assert float(warm.shadow[0][0]) == pytest.approx(before * share + 1 - share)
    copy = Ema(weights, 0.9)
    copy.load_state_dict(ema.state_dict())
    assert torch.equal(copy.shadow[1], ema.shadow[1])
    with pytest.raises(ValueError, match="shape"):
        Ema([torch.zeros(4), torch.zeros(2)], 0.9).load_state_dict(ema.state_dict())


def test_walk_starts_at_the_last_but_one_node_visits_all_and_stays_at_the_teacher():
    nodes, interval = 5, 3  # node 0, the teacher, to node 4
    switches = fixed_switches(nodes, interval)
    walk = [target_node(update, nodes, switches) for update in range(30)]
    assert walk == [3] * 3 + [2] * 3 + [1] * 3 + [0] * 21
    assert [target_node(update, 2, fixed_switches(2, 3)) for update in range(5)] == [0] * 5


def test_walk_of_recorded_decisions():
    assert [target_node(u, 4, []) for u in (0, 100)] == [2, 2]
    assert [target_node(u, 4, [7]) for u in (6, 7, 100)] == [2, 1, 1]
    assert [target_node(u, 4, [7, 9]) for u in (8, 9, 100)] == [1, 0, 0]
    settings = WalkSettings(mode="adaptive", interval=10, share=0.5, most=40)
    assert not moves_on(settings, 9, 0, 1.0, 0.1)  # too early
    assert moves_on(settings, 10, 0, 1.0, 0.4)
    assert not moves_on(settings, 30, 0, 1.0, 0.6)
    assert moves_on(settings, 40, 0, 1.0, 0.9)  # long enough
    assert not moves_on(settings, 40, 30, 1.0, 0.9)


def test_nodes_are_spread_by_distance_and_end_at_the_last():
    distances = [0.1, 0.4, 0.5, 0.6, 0.7, 0.8, 0.95, 1.0]
    assert choose_nodes(distances, 4) == [0, 2, 4, 7] or choose_nodes(distances, 4) == [1, 2, 5, 7]
    chosen = choose_nodes(distances, 4)
    assert chosen == sorted(set(chosen)) and chosen[-1] == 7
    assert choose_nodes(distances, 1) == [7]
    assert choose_nodes([0.2, 0.3], 4) == [0, 1]
    assert choose_nodes([0.2], 3) == [0]


def test_learning_rate():
    settings = OptimizerSettings(lr=1.0, warmup=4, decay="cosine")
    rates = [learning_rate(settings, step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.25) and rates[3] > 0.99 and rates[50] == pytest.approx(0.5) and rates[100] < 1e-9
    assert learning_rate(OptimizerSettings(lr=0.5), 10**6, 10) == 0.5
