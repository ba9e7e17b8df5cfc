"""What the study runs: parts, each with rows that are compared at equal compute on one problem."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from benchmarks.convergence.recipes import METHODS, Recipe

PICK = (100, 101, 102)  # seeds that learning rates are chosen on; quoted rows have other ones
QUOTED = (1, 2, 3, 4, 5)
FEW = (1, 2, 3)

DIGITS = Recipe()
EMOJI = Recipe(level=499, guidance=1.5, nodes=3, budget=603)
# As the paper: Diff-Instruct's gradient, its Adam and constant rates, equal or not; no guidance, there are no captions.
PIXELS = Recipe(
    objective="difference",
    level=2.5,
    guidance=1.0,
    betas=(0.0, 0.999),
    decay="constant",
    lr=1e-4,
    fake_lr=1e-3,
    budget=800,
)
# DMD2's SDXL run, which the paper's code is built on; learning rates are those that suit these networks best.
RELEASED = Recipe(
    betas=(0.9, 0.999), decay="constant", fake_updates=5, guidance=8.0, level=399, ema=0.0, lr=1e-4, fake_lr=1e-4
)


@dataclass(frozen=True)
class Part:
    """rows: recipes by label. grid: changes of a row's recipe, of which each row but the `untuned` takes its own best on the seeds `picks`."""

    problem: str
    name: str
    rows: dict[str, Recipe]
    seeds: tuple[int, ...] = QUOTED
    grid: tuple[dict, ...] = ({},)
    untuned: tuple[str, ...] = ()
    picks: tuple[int, ...] = PICK
    points: int = 8


@dataclass
class Runs:
    """run: (problem, recipe, seed, points) -> the points of a run, now or from an earlier call."""

    run: Callable[[str, Recipe, int, int], list[dict]]
    chosen: dict[tuple[str, str, str], Recipe] = field(default_factory=dict)

    def of(self, part: Part) -> dict[str, list[list[dict]]]:
        """Every row's runs: label -> seeds -> points."""
        return {label: self._row(part, label, recipe) for label, recipe in part.rows.items()}

    def _row(self, part: Part, label: str, recipe: Recipe) -> list[list[dict]]:
        choices = [replace(recipe, **change) for change in (part.grid if label not in part.untuned else ({},))]
        if len(choices) > 1:
            tried = [[self.run(part.problem, choice, seed, part.points) for seed in part.picks] for choice in choices]
            recipe = min(zip(choices, map(merit, tried), strict=True), key=lambda pair: pair[1])[0]
        else:
            recipe = choices[0]
        self.chosen[part.problem, part.name, label] = recipe
        return [self.run(part.problem, recipe, seed, part.points) for seed in part.seeds]


def merit(runs: list[list[dict]]) -> float:
    """What learning rates are chosen by: the product of both metrics, over the second half of the points and all seeds."""
    values = [point["fid"] * point["pixel_fd"] for points in runs for point in points[len(points) // 2 :]]
    return sum(values) / len(values)


def equal_rates(*rates: float) -> tuple[dict, ...]:
    return tuple({"lr": rate, "fake_lr": rate} for rate in rates)


def methods(base: Recipe, **more: object) -> dict[str, Recipe]:
    return {name: replace(base, method=name, **more) for name in METHODS}


def pairs(base: Recipe, changes: dict[str, dict]) -> dict[str, Recipe]:
    """Plain distillation and the walk under each change."""
    return {
        f"{label}: {name}": replace(base, method=name, **change)
        for label, change in changes.items()
        for name in ("none", "walk")
    }


def changed(base: Recipe, changes: dict[str, dict], **more: object) -> dict[str, Recipe]:
    return {label: replace(base, **change, **more) for label, change in changes.items()}


STARTS = {
    "random start": {"start": "random"},
    "half the channels": {"start": "small"},
    "timestep 99": {"level": 99},
    "timestep 399": {"level": 399},
    "timestep 999": {"level": 999},
}
SETTINGS = {
    "5 fake updates": {"fake_updates": 5},
    "fake rate x 0.1": {"fake_lr": 6e-5},
    "fake rate x 10": {"fake_lr": 6e-3},
    "no guidance": {"guidance": 1.0},
    "4 steps": {"student": (999, 749, 499, 249)},
    "GAN term": {"gan": 5e-3},
}
TRICKS = {
    "as it is": {},
    "DynaRS over 0.3": {"early": 0.3},
    "IDA 0.03": {"ida": 0.03},
    "EMA 0.8": {"ema": 0.8},
    "EMA 0.95": {"ema": 0.95},
    "EMA warm-up": {"ema_warmup": True},
    "fake rate x 0.5": {"fake_lr": 3e-4},
    "fake rate x 2": {"fake_lr": 1.2e-3},
    "constant rate": {"decay": "constant"},
    "betas (0.9, 0.999)": {"betas": (0.9, 0.999)},
    "guidance 2 to 1.25": {"guidance_start": 2.0},
    "guidance apart (Decoupled DMD)": {"apart": True},
    "no guidance, fake score without captions (Zero-CFG)": {"guidance": 1.0, "fake_text": False},
    "node guidance 1 for guidance": {"guidance": 1.0, "node_guidance": 1.0},
    "GAN term 0.005": {"gan": 5e-3},
    "GAN term 0.05": {"gan": 5e-2, "head": 0.1},
    "f-distill, Jensen-Shannon": {"divergence": "jensen-shannon"},
    "f-distill, forward KL": {"divergence": "forward-kl"},
    "f-distill, Jensen-Shannon, GAN term 0.005": {"divergence": "jensen-shannon", "gan": 5e-3},
}
GUIDANCE = {
    "as it is": {},
    "guidance from 1": {"guidance_start": 1.0},
    "no guidance": {"guidance": 1.0},
    "node guidance 1": {"guidance": 1.0, "node_guidance": 1.0, "method": "warm"},
}
DIGITS_GUIDANCE = {
    "guidance 1.1": {"guidance": 1.1},
    "node guidance 0.5": GUIDANCE["node guidance 1"] | {"node_guidance": 0.5},
}
# Runs that go well and badly, to see what tells them apart beforehand.
TROUBLE = {
    "as it is": {},
    "fake rate x 0.1": {"fake_lr": 6e-5},
    "fake rate x 10": {"fake_lr": 6e-3},
    "both rates x 4": {"lr": 9.6e-4, "fake_lr": 2.4e-3},
    "generator rate x 4": {"lr": 9.6e-4},
    "guidance 4": {"guidance": 4.0},
    "betas (0.9, 0.999)": {"betas": (0.9, 0.999)},
}
PIXEL_TROUBLE = {
    "as it is": {},
    "equal rates": {"fake_lr": 1e-4},
    "generator rate x 3": {"lr": 3e-4},
    "5 fake updates": {"fake_updates": 5},
    "betas (0.9, 0.999)": {"betas": (0.9, 0.999)},
}
PIXEL_RATES = (*equal_rates(1e-4), {"lr": 1e-4, "fake_lr": 1e-3}, {"lr": 3e-4, "fake_lr": 1e-3})
RATES = ({"lr": 1.2e-4}, {"lr": 2.4e-4})


def recipes(problem: str, ours: Recipe, budget: float, longer: bool, points: int = 12, **more: object) -> Part:
    """The recipe of the release against ours, each with its own budget. SDXL's guidance and timestep do not suit these data, so
    that the release's optimizer stands there with ours, too."""
    released = replace(RELEASED, budget=budget)
    suited = replace(released, guidance=ours.guidance, level=ours.level)
    rows = {"as released": released, "as released, our guidance and timestep": suited}
    ours = replace(ours, ema_warmup=True)  # found in this study, and in no other part of it
    mine = {"ours": ours} | ({"ours, longer": replace(ours, budget=budget)} if longer else {})
    return Part(
        problem, "recipe", rows | mine, grid=equal_rates(3e-5, 1e-4), untuned=tuple(mine), points=points, **more
    )


FULL = [
    Part("photographs", "paper", methods(PIXELS), grid=PIXEL_RATES, picks=PICK[:1]),
    recipes("digits", DIGITS, 1200, longer=True),
    Part("digits", "dmd", methods(DIGITS), grid=RATES, picks=PICK[:1]),
    Part("digits", "dmd, equal rates", methods(DIGITS)),
    recipes("emoji", EMOJI, 1200, longer=False, points=6, picks=PICK[:1]),
    Part("emoji", "dmd", {name: recipe for name, recipe in methods(EMOJI).items() if name != "fine"}),
    Part("emoji-pixels", "paper", methods(PIXELS)),
    Part("digits", "vsd", methods(DIGITS, objective="vsd"), grid=RATES, picks=PICK[:1]),
    Part("digits", "vsd, equal rates", methods(DIGITS, objective="vsd")),
    Part("digits", "sid", methods(DIGITS, objective="sid"), grid=RATES, picks=PICK[:1]),
    Part("digits", "starts", pairs(DIGITS, STARTS), FEW),
    Part("digits", "settings", pairs(DIGITS, SETTINGS), FEW),
    Part("digits", "tricks", changed(DIGITS, TRICKS), FEW),
    Part("digits", "guidance", changed(DIGITS, GUIDANCE | DIGITS_GUIDANCE)),
    Part("emoji", "guidance", changed(EMOJI, GUIDANCE | {"EMA warm-up": {"ema_warmup": True}}), FEW),
    Part("digits", "diagnostics", changed(DIGITS, TROUBLE, refit=20), FEW, points=6),
    Part("photographs", "diagnostics", changed(PIXELS, PIXEL_TROUBLE, refit=20), FEW, points=6),
    Part("photographs", "dmd", methods(PIXELS, objective="dmd"), grid=PIXEL_RATES, picks=PICK[:1]),
    Part("photographs", "sigma 1", methods(PIXELS, level=1.0), grid=PIXEL_RATES, picks=PICK[:1]),
]
QUICK = [recipes("digits", DIGITS, 1200, longer=True, seeds=(1,)), Part("digits", "dmd", methods(DIGITS), (1, 2, 3))]
PROFILES = {"quick": QUICK, "full": FULL}
